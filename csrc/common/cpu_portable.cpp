#define LEAFKERN_ISA portable
#include "common/cpu.inl"
