// The table of loss_form, apart from the kernels, so that a new line compiles in a second.
#include "cuda/forms.h"

#include <vector>

namespace erc {
namespace cuda {
namespace {

// The first line of a GPU that holds a row counts; without one it takes a cluster. `make gpu-report` times both forms, and
// `python -m benchmarks loss-forms` writes the lines of its summary here, in the place of the GPU's other lines.
const std::vector<FormLine> kTable = {
    {90, 297, LossForm::kCluster},  // modelled: docs/kernels.md
    {100, 297, LossForm::kCluster},  // modelled: docs/kernels.md
};

std::vector<FormLine> table = kTable;

}  // namespace

LossForm loss_form(int capability, int64_t row_bytes) {
  for (const FormLine& line : table) {
    if (line.capability == capability && row_bytes <= int64_t(line.row_kib) * 1024) return line.form;
  }
  return LossForm::kCluster;
}

}  // namespace cuda
}  // namespace erc

// Puts other lines in the table's place, so that both forms can be timed and tested; none: the table's own again.
extern "C" __attribute__((visibility("default"))) void erc_cuda_loss_forms(const erc::cuda::FormLine* lines, int count) {
  using erc::cuda::kTable;
  erc::cuda::table = count > 0 ? std::vector<erc::cuda::FormLine>(lines, lines + count) : kTable;
}
