#define LEAFKERN_ISA portable
#include "distill/cpu.inl"
