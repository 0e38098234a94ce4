#define LEAFKERN_ISA avx2
#include "common/cpu.inl"
