// A small thread pool of our own: torch brings its own OpenMP runtime, and ours must survive fork().
#pragma once

#include <cstdint>

namespace leafkern {

// Calls task(context, index, slot) once for every index in [0, count), in rising order within each slot, on at most
// `threads` threads, the caller among them (slot 0); slot < threads. Returns when all are done. A task must not
// throw or call parallel(). While another call has the pool, the caller works alone.
void parallel(int threads, int64_t count, void (*task)(void* context, int64_t index, int slot), void* context);

}  // namespace leafkern
