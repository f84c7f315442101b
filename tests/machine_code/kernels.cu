// What is compiled to machine code.
#include "../../csrc/cuda/mutual_match_kernels.cuh"
