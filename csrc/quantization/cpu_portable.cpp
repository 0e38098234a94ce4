#define LEAFKERN_ISA portable
#include "quantization/cpu.inl"
