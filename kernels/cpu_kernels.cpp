// What deltas add to a layer's output, straight from the packed bytes: one call for all tenants of a batch at one
// site, which also gathers their rows of x and adds to theirs of y.
//
// First t = scale * (q_V x - v_zero * sum x), tiles of directions being the tasks; then y += row_scale * (q_U t -
// sum u_zero t) + bias, with blocks of 128 outputs. No two tasks write to the same place and every sum has a fixed
// order, so the result does not depend on the number of threads.
//
// Plain C++ without headers of torch: it compiles in seconds where it is first used.

#include "cpu_factors.h"
#include "cpu_lookup.h"

namespace {

constexpr int MAX_TOKENS = 16; // of one tenant at once: what is laid out for them stays in the caches

// What is computed for one tenant at once, of at most MAX_TOKENS tokens.
struct Work {
    const Factors *factors;
    const int64_t *rows;
    int count;
    int64_t shrink_end = 0, expand_end = 0;         // tasks up to and with this tenant's
    float *x = nullptr, *sums = nullptr;            // [count][blocks * 128], [count]
    float *t = nullptr, *zeros = nullptr;           // [count][columns of t], [count][parts]
    float *x_tables = nullptr, *t_tables = nullptr; // [count][tables][16]

    int64_t width() const { return int64_t(factors->blocks) * BLOCK; }
    int64_t columns() const { return factors->scale.size(); }
#ifdef PRINMIX_LOOKUP
    Floats *tables_of_x(int row) const {
        return (Floats *)x_tables + int64_t(row) * factors->blocks * TABLES_PER_BLOCK;
    }
    Floats *tables_of_t(int row, const Part &part) const {
        return (Floats *)t_tables + row * factors->tables + part.tables;
    }
#endif
};

// Calls f(first token, how many as a constant) for pieces of n tokens: unpacked once for a piece.
template <class F> void for_tokens(int n, F f) {
    int first = 0;
    if constexpr (!LOOKUP) {
        for (; n - first >= 16; first += 16)
            f(first, std::integral_constant<int, 16>());
        for (; n - first >= 4; first += 4)
            f(first, std::integral_constant<int, 4>());
        for (; n - first >= 2; first += 2)
            f(first, std::integral_constant<int, 2>());
    }
    for (; first < n; first++)
        f(first, std::integral_constant<int, 1>());
}

template <class Type> void gather(const Work &work, int row, const typename Type::Element *from) {
    const Factors &factors = *work.factors;
    float *to = work.x + row * work.width();
    std::fill(to, to + factors.col_offset, 0.f);
    std::fill(to + factors.col_offset + factors.cols, to + work.width(), 0.f);
    float *at = to + factors.col_offset;
    int i = 0;
    for (; i + TILE <= factors.cols; i += TILE)
        store(at + i, load_as<Type>(from + i, TILE));
    if (i < factors.cols) {
        const Floats rest = load_as<Type>(from + i, factors.cols - i);
        std::memcpy(at + i, &rest, (factors.cols - i) * sizeof(float));
    }
    Floats total = {};
    for (i = 0; i < work.width(); i += TILE)
        total += load(to + i);
    work.sums[row] = sum(total);
#ifdef PRINMIX_LOOKUP
    tables_of_x(work.tables_of_x(row), to, factors.blocks);
#endif
}

void shrink(const Work &work, const ShrinkTask &task) {
    const Factors &factors = *work.factors;
    for_tokens(work.count, [&](int first, auto tokens) {
        Floats total[TILES_PER_TASK][tokens.value] = {};
        for (const Plane &plane : task.planes)
            with_width(plane.width, [&](auto width) {
#ifdef PRINMIX_LOOKUP
                look_up_tiles<width.value, TILES_PER_TASK>(total[0], plane, task.first_tile, task.tiles, factors.blocks,
                                                           work.tables_of_x(first));
#else
                for (int i = 0; i < task.tiles; i++) {
                    const int tile = task.first_tile + i, n = std::min(TILE, plane.directions - tile * TILE);
                    const uint16_t *at = plane.tile(tile, factors.blocks);
                    const float *x = work.x + first * work.width();
                    if (n == TILE) // a constant, once inlined
                        dot_plane<width.value, tokens.value>(total[i], at, TILE, factors.blocks, x, work.width(), plane.place);
                    else
                        dot_plane<width.value, tokens.value>(total[i], at, n, factors.blocks, x, work.width(), plane.place);
                }
#endif
            });
        for (int i = 0; i < task.tiles; i++)
            for (int m = 0; m < tokens.value; m++) {
                const int column = task.start + (task.first_tile + i) * TILE;
                store(work.t + (first + m) * work.columns() + column,
                      load(&factors.scale[column]) * (total[i][m] - load(&factors.v_zero[column]) * work.sums[first + m]));
            }
    });
}

// What expand needs of each token beside t: a sum for the zero points, and tables.
void prepare_expand(const Work &work, int row) {
    const Factors &factors = *work.factors;
    const float *t = work.t + row * work.columns();
    for (size_t number = 0; number < factors.parts.size(); number++) {
        const Part &part = factors.parts[number];
        Floats total = {};
        for (int i = part.start; i < part.start + part.directions; i += TILE)
            total += load(t + i) * load(&factors.u_zero[i]);
        work.zeros[row * factors.parts.size() + number] = sum(total);
#ifdef PRINMIX_LOOKUP
        Floats *tables = work.tables_of_t(row, part);
        for (const Plane &plane : part.u)
            tables = tables_of_t(tables, t + plane.start, plane);
#endif
    }
}

template <class Type>
void expand(const Work &work, const ExpandTask &task, typename Type::Element *y, int64_t y_stride) {
    const Factors &factors = *work.factors;
    const Part &part = *task.part;
    const Slice &slice = part.slice;
    const int start = task.block * BLOCK - slice.row_offset; // the block's first row
    const int begin = std::max(0, start), end = std::min(slice.rows, start + BLOCK);
    for_tokens(work.count, [&](int first, auto tokens) {
        float block[tokens.value][BLOCK] = {};
#ifdef PRINMIX_LOOKUP
        look_up_block(block[0], part.u, slice.u_blocks, task.block, work.tables_of_t(first, part));
#else
        const auto multiply = [&](auto width) {
            combine<width.value, tokens.value>(block[0], part.u, slice.u_blocks, task.block,
                                               work.t + first * work.columns(), work.columns());
        };
        multiply(std::integral_constant<int, 1>());
        multiply(std::integral_constant<int, 2>());
        multiply(std::integral_constant<int, 4>());
#endif
        for (int m = 0; m < tokens.value; m++) {
            const float zero = work.zeros[(first + m) * factors.parts.size() + (&part - factors.parts.data())];
            typename Type::Element *to = y + work.rows[first + m] * y_stride + slice.y_start;
            for (int o = begin; o < end; o += TILE) {
                const int n = std::min(TILE, end - o);
                Floats value = load_as<Float32>(&block[m][o - start], n) - zero;
                if (slice.row_scale)
                    value *= load_as<Float16>(slice.row_scale + o, n);
                if (factors.bias)
                    value += load_as<Float32>(factors.bias + slice.y_start + o, n);
                store_as<Type>(to + o, load_as<Type>(to + o, n) + value, n);
            }
        }
    });
}

// Memory for a call's Work, kept for the next one: the worker calls from one thread.
struct Scratch {
    std::vector<Work> works;
    std::vector<float> memory;

    // Lays out what was appended to `works`.
    void allocate() {
        int64_t size = 0, shrink_end = 0, expand_end = 0;
        for (int pass = 0; pass < 2; pass++) {
            float *base = nullptr;
            if (pass) {
                memory.resize(std::max<int64_t>(memory.size(), size + TILE));
                base = (float *)((uintptr_t(memory.data()) + 63) / 64 * 64);
            }
            size = 0;
            const auto take = [&](int64_t count) {
                float *at = base + size;
                size += (count + TILE - 1) / TILE * TILE; // aligned like cache lines
                return at;
            };
            for (Work &work : works) {
                const Factors &factors = *work.factors;
                work.x = take(work.count * work.width());
                work.sums = take(work.count);
                work.t = take(work.count * work.columns());
                work.zeros = take(work.count * factors.parts.size());
                work.x_tables = take(LOOKUP ? work.width() / 2 * TILE * work.count : 0);
                work.t_tables = take(LOOKUP ? factors.tables * TILE * work.count : 0);
                if (pass) {
                    work.shrink_end = shrink_end += factors.shrink.size();
                    work.expand_end = expand_end += factors.expand.size();
                }
            }
        }
    }
};

thread_local Scratch scratch;

// Fills `scratch` with the tokens of every group from `from` on; whether there are any.
bool collect(const Factors *const *table, const Group *groups, int n_groups, const int64_t *rows, int from) {
    auto &works = scratch.works;
    works.clear();
    for (const Group *group = groups; group < groups + n_groups; group++)
        if (table[group->slot] && group->count > from)
            works.push_back({table[group->slot], rows + group->first + from, std::min(MAX_TOKENS, group->count - from)});
    scratch.allocate();
    return !works.empty();
}

// Calls f(work, index) for every index of every work, side by side; end(work): indices up to and with a work's.
template <class End, class F> void for_each(const std::vector<Work> &works, End end, F f) {
    const int64_t total = works.empty() ? 0 : end(works.back());
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < total; number++) {
        const auto found = std::upper_bound(works.begin(), works.end(), number,
                                            [&](int64_t n, const Work &work) { return n < end(work); });
        f(*found, number - (found == works.begin() ? 0 : end(found[-1])));
    }
}

} // namespace

extern "C" {

Factors *prinmix_prepare(const Slice *slices, int n_slices, int cols, int col_offset, const float *bias, int t_given) {
    return prepare(slices, n_slices, cols, col_offset, bias, t_given).release();
}

void prinmix_free(Factors *factors) { delete factors; }

// y[row] += x[row] dW^T + bias for the rows of each group whose slot has factors in `table`.
// x, y: rows `stride` numbers apart, of a type in native.py's DTYPES.
void prinmix_linear(const Factors *const *table, const Group *groups, int n_groups, const int64_t *rows, const void *x,
                    int64_t x_stride, int x_type, void *y, int64_t y_stride, int y_type) {
    for (int from = 0; collect(table, groups, n_groups, rows, from); from += MAX_TOKENS) {
        const auto &works = scratch.works;
#pragma omp parallel
        {
            for (const Work &work : works) {
#pragma omp for nowait
                for (int row = 0; row < work.count; row++)
                    with_type(x_type, [&](auto type) {
                        using Type = decltype(type);
                        gather<Type>(work, row, (const typename Type::Element *)x + work.rows[row] * x_stride);
                    });
            }
#pragma omp barrier
            for_each(
                works, [](const Work &work) { return work.shrink_end; },
                [](const Work &work, int64_t task) { shrink(work, work.factors->shrink[task]); });
            for (const Work &work : works) {
#pragma omp for nowait
                for (int row = 0; row < work.count; row++)
                    prepare_expand(work, row);
            }
#pragma omp barrier
            for_each(
                works, [](const Work &work) { return work.expand_end; },
                [&](const Work &work, int64_t task) {
                    with_type(y_type, [&](auto type) {
                        using Type = decltype(type);
                        expand<Type>(work, work.factors->expand[task], (typename Type::Element *)y, y_stride);
                    });
                });
        }
    }
}

// y[rows[i]] += t[i] times the directions. t: [count][directions], without the columns between classes.
void prinmix_expand(const Factors *factors, const float *t, const int64_t *rows, int count, void *y, int64_t y_stride,
                    int y_type) {
    const Group group = {0, 0, count};
    for (int from = 0; collect(&factors, &group, 1, rows, from); from += MAX_TOKENS) {
        const auto &works = scratch.works;
        const Work &work = works[0];
        std::fill(work.t, work.t + work.count * work.columns(), 0.f);
        for (int row = 0; row < work.count; row++)
            for (const Part &part : factors->parts) {
                const Plane *last = nullptr;
                for (const Plane &plane : part.u)
                    if (!last || plane.start != last->start) { // a class's first plane
                        std::copy(t, t + plane.directions, work.t + row * work.columns() + plane.start);
                        t += plane.directions;
                        last = &plane;
                    }
            }
#pragma omp parallel
        {
#pragma omp for
            for (int row = 0; row < work.count; row++)
                prepare_expand(work, row);
            for_each(
                works, [](const Work &work) { return work.expand_end; },
                [&](const Work &work, int64_t task) {
                    with_type(y_type, [&](auto type) {
                        using Type = decltype(type);
                        expand<Type>(work, factors->expand[task], (typename Type::Element *)y, y_stride);
                    });
                });
        }
    }
}

// y[row][head] = RMSNorm(x[row][head]) * weight for the rows of each group whose slot has a weight in `table`.
// x, y: [rows][heads][size], rows and heads `stride` and `inner` numbers apart.
void prinmix_norm(const float *const *table, const Group *groups, int n_groups, const int64_t *rows, int heads, int size,
                  float eps, const void *x, int64_t x_stride, int64_t x_inner, int x_type, void *y, int64_t y_stride,
                  int64_t y_inner, int y_type) {
    for (const Group *group = groups; group < groups + n_groups; group++) {
        const float *weight = table[group->slot];
        if (!weight)
            continue;
#pragma omp parallel for collapse(2) if (int64_t(group->count) * heads * size > 1 << 15)
        for (int i = 0; i < group->count; i++)
            for (int head = 0; head < heads; head++)
                with_type(x_type, [&](auto in) {
                    with_type(y_type, [&](auto out) {
                        using In = decltype(in);
                        using Out = decltype(out);
                        const int64_t row = rows[group->first + i];
                        const auto *from = (const typename In::Element *)x + row * x_stride + head * x_inner;
                        auto *to = (typename Out::Element *)y + row * y_stride + head * y_inner;
                        Floats total = {};
                        for (int k = 0; k < size; k += TILE) {
                            const Floats value = load_as<In>(from + k, std::min(TILE, size - k));
                            total += value * value;
                        }
                        const float factor = 1 / std::sqrt(sum(total) / size + eps);
                        for (int k = 0; k < size; k += TILE) {
                            const int n = std::min(TILE, size - k);
                            store_as<Out>(to + k, load_as<In>(from + k, n) * factor * load_as<Float32>(weight + k, n), n);
                        }
                    });
                });
    }
}
}
