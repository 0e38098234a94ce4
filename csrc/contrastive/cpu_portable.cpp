#define LEAFKERN_ISA portable
#include "contrastive/cpu.inl"
