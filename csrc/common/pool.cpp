#include "common/pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace leafkern {
namespace {

struct Job {
    void (*task)(void*, int64_t, int);
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};

    void work(int slot) {
        for (int64_t index; (index = next.fetch_add(1)) < count;) task(context, index, slot);
    }
};

class Pool {
  public:
    bool run(Job& job, int threads) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < threads - 1) {
                try {
                    std::thread(&Pool::loop, this, ++workers_, round_).detach();
                } catch (...) {
                    // Fewer threads than asked for: those that there are share the work.
                    --workers_;
                    break;
                }
            }
            job_ = &job;
            wanted_ = threads - 1 < workers_ ? threads - 1 : workers_;
            running_ = wanted_;
            ++round_;
        }
        wake_.notify_all();
        job.work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        return true;
    }

  private:
    void loop(int slot, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (slot > wanted_) continue;
            Job* job = job_;
            lock.unlock();
            job->work(slot);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int workers_ = 0, wanted_ = 0, running_ = 0;
    uint64_t round_ = 0;
};

// Never destroyed: its threads may outlive static destruction. After fork() the child has none of them, and locks in
// an unknown state, so it starts anew.
std::atomic<Pool*> pool{nullptr};

Pool& instance() {
    Pool* present = pool.load();
    if (present != nullptr) return *present;
#ifndef _WIN32
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
#endif
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(present, fresh)) return *fresh;
    delete fresh;
    return *present;
}

}  // namespace

void parallel(int threads, int64_t count, void (*task)(void*, int64_t, int), void* context) {
    Job job{task, context, count};
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1 || !instance().run(job, threads)) job.work(0);
}

}  // namespace leafkern
