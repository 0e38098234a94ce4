#define LEAFKERN_ISA avx2
#include "distill/cpu.inl"
