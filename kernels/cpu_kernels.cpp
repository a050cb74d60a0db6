// What deltas add to a layer's output, straight from the packed bytes: one call for all tenants of a batch at one
// site, which also gathers their rows of x and adds to theirs of y.
//
// First t = scale * (q_V x - v_zero * sum x), tiles of directions being the tasks; then y += row_scale * (q_U t -
// sum u_zero t) + bias, with blocks of 128 outputs. No two tasks write to the same place and every sum has a fixed
// order, so the result does not depend on the number of threads.
//
// Plain C++ without headers of torch: it compiles in seconds where it is first used.

#include "cpu_lookup.h"
#include "cpu_planes.h"
#include "cpu_vectors.h"

extern "C" {

// The structures are mirrored in native.py.

struct BitClass {
    const uint16_t *v, *u;
    int32_t v_bits, u_bits, directions;
};

struct Slice { // a packed module: one slice of a layer's output; without classes, one that is not changed
    const BitClass *classes;
    const float *scale;              // [directions], the classes' one after another; zero points too
    const uint16_t *v_zero, *u_zero; // float16 [directions]
    const uint16_t *row_scale;       // float16 [rows] or null
    int32_t n_classes;
    int32_t u_blocks;
    int32_t rows, row_offset; // which codes of U count, as in packed.Extent
    int32_t y_start;          // its first column of y
};

struct Group { // rows of a batch that belong to one slot: `count` of the batch's list of rows, from `first` on
    int32_t slot, first, count;
};
}

namespace {

constexpr int TILES_PER_TASK = 4;

struct Part { // a slice as the tasks see it
    Slice slice;
    std::vector<Plane> u; // their `start` counts from the first column of the whole site's t
    int start, directions;
    int64_t tables; // of t, in front of this slice's
};

struct ShrinkTask {
    std::vector<Plane> planes; // of one class of V
    int start, first_tile, tiles;
};

struct ExpandTask {
    const Part *part;
    int block;
};

// A tenant's packed factors at one site. Columns of t are its directions, every class's begin at a multiple of TILE.
struct Factors {
    int cols, col_offset, blocks;
    const float *bias; // [columns of y] or null
    std::vector<Part> parts;
    std::vector<float> scale, v_zero, u_zero; // [columns of t], zero where there is no direction
    std::vector<ShrinkTask> shrink;
    std::vector<ExpandTask> expand;
    int64_t tables = 0; // of t
};

// The planes of `n` directions' codes; see PLANES in packing.py.
std::vector<Plane> planes_of(const uint16_t *at, int bits, int n, int blocks, int start) {
    std::vector<Plane> planes;
    for (float place = 1; bits;) {
        const int width = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
        planes.push_back({at, width, n, start, place});
        at += int64_t(n) * blocks * 8 * width;
        place *= 1 << width;
        bits -= width;
    }
    return planes;
}

// What is computed for one tenant in one call. Arrays have a row for each of its tokens; `single` of them, the
// last ones, are computed by looking up.
struct Work {
    const Factors *factors;
    const int64_t *rows;
    int count, single;
    int64_t shrink_end, expand_end; // tasks up to and with this tenant's
    float *x, *sums;                // [count][blocks * 128], [count]
    float *t, *zeros;               // [count][columns of t], [count][parts]
    float *x_tables, *t_tables;     // [single][tables][16]

    int64_t width() const { return int64_t(factors->blocks) * BLOCK; }
    int64_t columns() const { return factors->scale.size(); }
};

// Calls f(first token, how many as a constant) for pieces of n tokens: unpacked once for a piece.
template <class F> void for_tokens(int n, F f) {
    int first = 0;
    for (; n - first >= 16; first += 16)
        f(first, std::integral_constant<int, 16>());
    for (; n - first >= 4; first += 4)
        f(first, std::integral_constant<int, 4>());
    if constexpr (!LOOKUP)
        for (; n - first >= 2; first += 2)
            f(first, std::integral_constant<int, 2>());
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
    if (row >= work.count - work.single)
        tables_of_x((Floats *)work.x_tables + int64_t(row - work.count + work.single) * factors.blocks * TABLES_PER_BLOCK,
                    to, factors.blocks);
#endif
}

void shrink(const Work &work, const ShrinkTask &task) {
    const Factors &factors = *work.factors;
    for_tokens(work.count, [&](int first, auto tokens) {
        Floats total[TILES_PER_TASK][tokens.value] = {};
        for (const Plane &plane : task.planes)
            with_width(plane.width, [&](auto width) {
#ifdef PRINMIX_LOOKUP
                if constexpr (tokens.value == 1) {
                    const Floats *tables = (const Floats *)work.x_tables +
                                           int64_t(first - work.count + work.single) * factors.blocks * TABLES_PER_BLOCK;
                    look_up_tiles<width.value, TILES_PER_TASK>(total[0], plane, task.first_tile, task.tiles,
                                                               factors.blocks, tables);
                    return;
                }
#endif
                for (int i = 0; i < task.tiles; i++) {
                    const int tile = task.first_tile + i, n = std::min(TILE, plane.directions - tile * TILE);
                    const uint16_t *at = plane.tile(tile, factors.blocks);
                    const float *x = work.x + first * work.width();
                    if (n == TILE) // a constant, once inlined
                        dot_plane<width.value, tokens.value>(total[i], at, TILE, factors.blocks, x, work.width(), plane.place);
                    else
                        dot_plane<width.value, tokens.value>(total[i], at, n, factors.blocks, x, work.width(), plane.place);
                }
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
        if (row < work.count - work.single)
            continue;
        Floats *tables = (Floats *)work.t_tables + (row - work.count + work.single) * factors.tables + part.tables;
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
        const auto multiply = [&](auto width) {
            combine<width.value, tokens.value>(block[0], part.u, slice.u_blocks, task.block,
                                               work.t + first * work.columns(), work.columns());
        };
#ifdef PRINMIX_LOOKUP
        if constexpr (tokens.value == 1) {
            look_up_block(block[0], part.u, slice.u_blocks, task.block,
                          (const Floats *)work.t_tables + (first - work.count + work.single) * factors.tables + part.tables);
        } else
#endif
        {
            multiply(std::integral_constant<int, 1>());
            multiply(std::integral_constant<int, 2>());
            multiply(std::integral_constant<int, 4>());
        }
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
                work.single = LOOKUP ? work.count % 4 : 0;
                work.x = take(work.count * work.width());
                work.sums = take(work.count);
                work.t = take(work.count * work.columns());
                work.zeros = take(work.count * factors.parts.size());
                work.x_tables = take(int64_t(work.single) * factors.blocks * BLOCK / 2 * TILE);
                work.t_tables = take(work.single * factors.tables * TILE);
                if (pass) {
                    work.shrink_end = shrink_end += factors.shrink.size();
                    work.expand_end = expand_end += factors.expand.size();
                }
            }
        }
    }
};

thread_local Scratch scratch;

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

// A tenant's factors at a site from their description, which may go afterwards while the packed bytes stay.
// t_given: only prinmix_expand is called.
Factors *prinmix_prepare(const Slice *slices, int n_slices, int cols, int col_offset, const float *bias, int t_given) {
    auto *factors = new Factors;
    factors->cols = cols;
    factors->col_offset = col_offset;
    factors->blocks = (col_offset + cols + BLOCK - 1) / BLOCK;
    factors->bias = bias;
    int start = 0;
    for (const Slice *slice = slices; slice < slices + n_slices; slice++) {
        Part part{*slice, {}, start, 0, factors->tables};
        int direction = 0;
        for (const BitClass *cls = slice->classes; cls < slice->classes + slice->n_classes; cls++) {
            const int n = cls->directions, tiles = (n + TILE - 1) / TILE;
            if (!n)
                continue;
            for (Plane plane : planes_of(cls->u, cls->u_bits, n, slice->u_blocks, start)) {
                part.u.push_back(plane);
                factors->tables += int64_t(tiles) * (plane.width == 4 ? TILE : TILE / 2);
            }
            for (int tile = 0; !t_given && tile < tiles; tile += TILES_PER_TASK)
                factors->shrink.push_back({planes_of(cls->v, cls->v_bits, n, factors->blocks, start), start, tile,
                                           std::min(TILES_PER_TASK, tiles - tile)});
            start += tiles * TILE;
            for (auto *table : {&factors->scale, &factors->v_zero, &factors->u_zero})
                table->resize(start);
            for (int i = 0; i < n; i++, direction++) {
                const int column = start - tiles * TILE + i;
                factors->scale[column] = slice->scale[direction];
                factors->v_zero[column] = load_as<Float16>(slice->v_zero + direction, 1)[0];
                factors->u_zero[column] = load_as<Float16>(slice->u_zero + direction, 1)[0];
            }
        }
        part.directions = start - part.start;
        factors->parts.push_back(std::move(part));
    }
    for (const Part &part : factors->parts)
        for (int block = 0; block < part.slice.u_blocks; block++)
            factors->expand.push_back({&part, block});
    return factors;
}

void prinmix_free(Factors *factors) { delete factors; }

// y[row] += x[row] dW^T + bias for the rows of each group whose slot has factors in `table`.
// x, y: rows `stride` numbers apart, of a type in native.py's DTYPES.
void prinmix_linear(const Factors *const *table, const Group *groups, int n_groups, const int64_t *rows, const void *x,
                    int64_t x_stride, int x_type, void *y, int64_t y_stride, int y_type) {
    auto &works = scratch.works;
    works.clear();
    for (const Group *group = groups; group < groups + n_groups; group++)
        if (table[group->slot] && group->count)
            works.push_back({table[group->slot], rows + group->first, group->count});
    if (works.empty())
        return;
    scratch.allocate();
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

// y[rows[i]] += t[i] times the directions. t: [count][directions], without the columns between classes.
void prinmix_expand(const Factors *factors, const float *t, const int64_t *rows, int count, void *y, int64_t y_stride,
                    int y_type) {
    auto &works = scratch.works;
    works.assign(1, {factors, rows, count});
    scratch.allocate();
    const Work &work = works[0];
    std::fill(work.t, work.t + count * work.columns(), 0.f);
    for (int row = 0; row < count; row++)
        for (const Part &part : factors->parts) {
            const Plane *last = nullptr;
            for (const Plane &plane : part.u)
                if (!last || plane.start != last->start) {
                    std::copy(t, t + plane.directions, work.t + row * work.columns() + plane.start);
                    t += plane.directions;
                    last = &plane;
                }
        }
#pragma omp parallel
    {
#pragma omp for
        for (int row = 0; row < count; row++)
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
