// What a compiled library was made for. erc/backend.py refuses one that was made for another erc/ops.py.
#include "common/stamp.h"

extern "C" __attribute__((visibility("default"))) const char* erc_stamp() { return ERC_STAMP; }
