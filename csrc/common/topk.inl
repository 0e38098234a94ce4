// Selection of the k best, compiled into each instruction set's own namespace.

// Keys order as (score, then lower id). Call only with score > thresholds[query] and ids rising per query.
void keep(Keeper* keeper, int query, int32_t score, int64_t id) {
    if (keeper->allowed != nullptr && !keeper->allowed[id]) return;
    const int k = keeper->k;
    int64_t* heap = keeper->keys + static_cast<int64_t>(query) * k;
    const int64_t key = static_cast<int64_t>(score) * (1ll << 32) + (0xFFFFFFFFll - id);
    int count = keeper->counts[query];
    if (count < k) {
        int place = count;
        while (place > 0 && heap[(place - 1) / 2] > key) {
            heap[place] = heap[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        heap[place] = key;
        keeper->counts[query] = ++count;
        if (count < k) return;
    } else {
        int place = 0;
        for (int child; (child = 2 * place + 1) < k; place = child) {
            if (child + 1 < k && heap[child + 1] < heap[child]) ++child;
            if (heap[child] >= key) break;
            heap[place] = heap[child];
        }
        heap[place] = key;
    }
    keeper->thresholds[query] = static_cast<int32_t>(heap[0] >> 32);
}
