// The widest instruction set this processor runs, of those that the kernels are compiled for.
#pragma once

#if defined(__x86_64__)
// `expression` of the namespace of that instruction set.
#define MG_OPS_FOR_THIS_PROCESSOR(expression)                                                                       \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && \
           __builtin_cpu_supports("avx512dq")                                                                       \
       ? avx512::expression                                                                                         \
   : __builtin_cpu_supports("avx2") ? avx2::expression                                                              \
                                    : baseline::expression)
#else
#define MG_OPS_FOR_THIS_PROCESSOR(expression) baseline::expression
#endif
