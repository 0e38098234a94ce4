#define LEAFKERN_ISA portable
#include "retrieval/cpu.inl"
