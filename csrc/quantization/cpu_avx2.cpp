#define LEAFKERN_ISA avx2
#include "quantization/cpu.inl"
