#define LEAFKERN_ISA avx2
#include "retrieval/cpu.inl"
