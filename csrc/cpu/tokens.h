// What is done per token and not per logit, on the CPU: the token table and the summary. Compiled once, for every processor.
#pragma once

#include "common/calls.h"

namespace erc {

// Fills the table. False, and nothing written that counts, where an active token has a value that no loss is defined for:
// Python then finds it and says which (erc/call.py).
template <class Real>
bool token_table(const TokenTable& call);

template <class Real>
void token_losses(const TokenLosses& call);

template <class Real>
void token_summary(const TokenSummary& call);

// Whether every label is a column of the vocabulary or ignored.
bool labels_are_valid(const RowInputs& rows, int64_t vocab_size);

}  // namespace erc
