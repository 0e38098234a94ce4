// Advice to the operating system about memory that others allocated.
#pragma once

#include <cstddef>

namespace leafkern {

// Asks for huge pages under the whole ones of [data, data + bytes), which first use then backs: fewer page faults and
// address translations. Without effect on pages already in use, and where the system has no such advice.
void advise_huge(void* data, size_t bytes);

}  // namespace leafkern
