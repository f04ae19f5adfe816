// The table of this instruction set's operators, under its name.
#include "cpu/isa/operators.h"

#define ERC_STRING_(x) #x
#define ERC_STRING(x) ERC_STRING_(x)

namespace erc {
namespace ERC_ISA {

extern const Kernels table;
const Kernels table{ERC_STRING(ERC_ISA), stats_forward,  stats_backward,  support_forward, support_backward,
                    policy_loss,         paired_forward, paired_backward, scale_rows};

}  // namespace ERC_ISA
}  // namespace erc
