#define LEAFKERN_ISA portable
#include "relative/cpu.inl"
