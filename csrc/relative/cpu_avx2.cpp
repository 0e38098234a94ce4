#define LEAFKERN_ISA avx2
#include "relative/cpu.inl"
