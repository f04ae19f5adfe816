#include "cpu/tokens.h"

#include "common/token_summary.h"
#include "common/token_table.h"

namespace erc {

// Whether a loss is defined for an active token with this mask, label and row.
template <class Real>
static bool is_valid(const TokenTable& call, Real mask, int64_t label, const TokenInputs<Real>& row) {
  const auto finite = [](Real x) { return x - x == 0; };
  return mask > 0 && finite(mask) && label >= 0 && label < call.vocab_size && finite(row.advantage) && finite(row.weight) &&
         finite(row.entropy_weight) && finite(row.logprob_weight) && row.old_entropy == row.old_entropy;
}

template <class Real>
bool token_table(const TokenTable& call) {
  Totals totals;
  for (int64_t group = 0, end = 0; group < call.num_groups; ++group) {
    const int64_t begin = end;
    end = group_begin(call, group + 1);
    TokenCount count;
    for (int64_t token = begin; token < end; ++token) count.add(TokenCount::of<Real>(call, token));
    call.group_sums[2 * group] = count.mask;
    call.group_sums[2 * group + 1] = count.nll;
    totals.add(call.group_sums + 2 * group);
  }
  *call.counter = 0;
  for (int64_t token = 0; token < call.num_tokens; ++token) {
    const Real mask = mask_of<Real>(call, token);
    const int64_t label = element<int64_t>(call.labels, token);
    const TokenInputs<Real> row = table_row<Real>(call, totals, token);
    if (mask != 0 && !is_valid(call, mask, label, row)) return false;
    static_cast<TokenInputs<Real>*>(call.table)[token] = row;
    call.final_labels[token] = mask == 0 ? call.ignore_index : label;
  }
  return true;
}

template <class Real>
void token_losses(const TokenLosses& call) {
  for (int64_t token = 0; token < call.num_tokens; ++token) judge_token<Real>(call, token);
}

template <class Real>
void token_summary(const TokenSummary& call) {
  SummaryState total;
  for (int64_t begin = 0; begin < call.num_tokens; begin += kCountRun) {
    SummaryState run;
    const int64_t end = begin + kCountRun < call.num_tokens ? begin + kCountRun : call.num_tokens;
    for (int64_t token = begin; token < end; ++token) run.add<Real>(call, token);
    total.merge(run);
  }
  total.write<Real>(call);
}

template bool token_table<float>(const TokenTable&);
template bool token_table<double>(const TokenTable&);
template void token_losses<float>(const TokenLosses&);
template void token_losses<double>(const TokenLosses&);
template void token_summary<float>(const TokenSummary&);
template void token_summary<double>(const TokenSummary&);

bool labels_are_valid(const RowInputs& rows, int64_t vocab_size) {
  if (rows.labels == nullptr) return true;
  for (int64_t row = 0; row < rows.logits.num_rows; ++row) {
    const int64_t token = rows.token(row);
    if (token < 0 || rows.labels[token] == rows.ignore_index) continue;
    if (rows.labels[token] < 0 || rows.labels[token] >= vocab_size) return false;
  }
  return true;
}

}  // namespace erc
