#define LEAFKERN_ISA avx2
#include "contrastive/cpu.inl"
