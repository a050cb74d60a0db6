// Products of activations with packed codes (docs/format.md, "Planes"), straight from the packed bytes.
//
// One call of each function serves all tenants of a batch at one site. Tiles of directions are the tasks of
// `shrink` (t = scale * (q_V x - v_zero * sum x)), blocks of 128 outputs those of `expand` (y += q_U t): no two
// tasks write to the same place and every sum has a fixed order, so the result does not depend on the number of
// threads. A product with codes is the sum over their planes of 2^place times the product with the plane. A
// vector register holds the same code of the 16 directions of a tile.
//
// Plain C++ with GCC's vector types, no headers of torch: it compiles in seconds where it is first used.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <type_traits>
#include <vector>

namespace {

constexpr int TILE = 16, BLOCK = 128, MAX_TOKENS = 16;

using Floats = float __attribute__((vector_size(4 * TILE)));
using Ints = int32_t __attribute__((vector_size(4 * TILE)));
using Words = uint16_t __attribute__((vector_size(2 * TILE)));

// `width` bits of each word from bit `shift` on.
template <int width> inline Floats codes(Words word, int shift) {
    const Ints wide = __builtin_convertvector(word, Ints) >> shift;
#ifdef __AVX512F__
    // A permutation looks at the low four bits of its index only, so that it masks and converts at once.
    constexpr int top = (1 << width) - 1;
    const Floats lookup = {0 & top, 1 & top, 2 & top,  3 & top,  4 & top,  5 & top,  6 & top,  7 & top,
                           8 & top, 9 & top, 10 & top, 11 & top, 12 & top, 13 & top, 14 & top, 15 & top};
    return __builtin_shuffle(lookup, wide);
#else
    return __builtin_convertvector(wide & ((1 << width) - 1), Floats);
#endif
}

// A word of each of a tile's n directions; the others get zero.
inline Words load(const uint16_t *from, int n) {
    Words word = {};
    if (n == TILE)
        std::memcpy(&word, from, sizeof word);
    else
        std::memcpy(&word, from, 2 * n);
    return word;
}

inline Floats load(const float *from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// out[i] = the sum of the 16 entries of v[i]: vectors are added in pairs, half of each, until one is left.
inline void sum_each(Floats *v, float *out) {
    constexpr Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int half = TILE / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], even + 1);
    std::memcpy(out, v, sizeof *v);
}

// total[m][direction] += place * sum_k x[m][k] q[k][direction]. tile: [blocks][8 * width][n]; x: rows `stride` apart.
template <int width, int tokens>
void dot_plane(Floats *total, const uint16_t *tile, int n, int blocks, const float *x, int64_t stride, float place) {
    constexpr int words = 8 * width, per_word = 16 / width;
    constexpr int chains = tokens >= 4 ? 1 : 4 / tokens; // independent sums hide the latency of an addition
    Floats sums[tokens][chains] = {};
    for (int b = 0; b < blocks; b++)
        for (int j = 0; j < words; j++) {
            const Words word = load(tile + (int64_t(b) * words + j) * n, n);
            const float *at = x + int64_t(b) * BLOCK + j;
#pragma GCC unroll 16
            for (int p = 0; p < per_word; p++) {
                const Floats q = codes<width>(word, p * width);
#pragma GCC unroll 16
                for (int m = 0; m < tokens; m++)
                    sums[m][p % chains] += q * at[m * stride + p * words];
            }
        }
    for (int m = 0; m < tokens; m++)
        for (int c = 0; c < chains; c++)
            total[m] += place * sums[m][c];
}

// A plane of U's codes of one class: its t begins at column `start` of the slice's.
struct Plane {
    const uint16_t *words;
    int directions, start;
    float place;
};

// y[m][128] += sum over planes and directions of place * t[m][direction] * q[direction][128], for block b.
template <int width, int tokens>
void combine(float *y, const std::vector<Plane> &planes, int blocks, int b, const float *t, int64_t stride) {
    constexpr int words = 8 * width, per_word = 16 / width;
    // 16 outputs at once: shifts of the same word, as many as there are, and neighbouring words.
    constexpr int shifts = std::min(per_word, TILE / tokens), neighbours = TILE / tokens / shifts;
    if (planes.empty())
        return;
    for (int j = 0; j < words; j += neighbours)
        for (int first = 0; first < per_word; first += shifts) {
            Floats sums[TILE] = {}; // [neighbours][shifts][tokens]
            for (const Plane &plane : planes) {
                const auto add = [&](int tile, int n) __attribute__((always_inline)) {
                    const uint16_t *at = plane.words + int64_t(tile) * TILE * blocks * words + (int64_t(b) * words + j) * n;
                    // The place goes with whichever are fewer, t's entries or codes.
                    constexpr bool few = tokens <= 4;
                    const float *from = t + plane.start + tile * TILE;
                    Floats scaled[few ? tokens : 1];
                    if constexpr (few)
#pragma GCC unroll 4
                        for (int m = 0; m < tokens; m++)
                            scaled[m] = load(from + m * stride) * plane.place;
#pragma GCC unroll 4
                    for (int k = 0; k < neighbours; k++) {
                        const Words word = load(at + k * n, n);
#pragma GCC unroll 16
                        for (int p = 0; p < shifts; p++) {
                            Floats q = codes<width>(word, (first + p) * width);
                            if constexpr (!few)
                                q *= plane.place;
#pragma GCC unroll 16
                            for (int m = 0; m < tokens; m++)
                                sums[(k * shifts + p) * tokens + m] += q * (few ? scaled[m] : load(from + m * stride));
                        }
                    }
                };
                const int full = plane.directions / TILE, rest = plane.directions % TILE;
                for (int tile = 0; tile < full; tile++)
                    add(tile, TILE);
                if (rest)
                    add(full, rest);
            }
            float totals[TILE];
            sum_each(sums, totals);
            for (int k = 0; k < neighbours; k++)
                for (int p = 0; p < shifts; p++)
                    for (int m = 0; m < tokens; m++)
                        y[m * BLOCK + (first + p) * words + j + k] += totals[(k * shifts + p) * tokens + m];
        }
}

// Calls f(start of the plane, its width as a constant, 2^place) for each plane; see PLANES in packing.py.
template <class F> void for_planes(const uint16_t *at, int bits, int64_t directions, int blocks, F f) {
    float place = 1;
    const auto plane = [&](auto width) {
        f(at, width, place);
        at += directions * blocks * 8 * width.value;
        place *= 1 << width.value;
        bits -= width.value;
    };
    while (bits)
        if (bits >= 4)
            plane(std::integral_constant<int, 4>());
        else if (bits >= 2)
            plane(std::integral_constant<int, 2>());
        else
            plane(std::integral_constant<int, 1>());
}

// Calls f(first token, how many as a constant) for pieces of n tokens: unpacked once for a piece.
template <class F> void for_tokens(int n, F f) {
    int first = 0;
    for (; n - first >= 16; first += 16)
        f(first, std::integral_constant<int, 16>());
    for (; n - first >= 4; first += 4)
        f(first, std::integral_constant<int, 4>());
    for (; n - first >= 2; first += 2)
        f(first, std::integral_constant<int, 2>());
    if (n > first)
        f(first, std::integral_constant<int, 1>());
}

} // namespace

extern "C" {

// The structures are mirrored in native.py.

struct BitClass {
    const uint16_t *v, *u;
    int32_t v_bits, u_bits, directions, start; // start: of its directions in the tables
};

struct Slice { // a packed module: one slice of a layer's output
    const BitClass *classes;
    const float *scale, *v_zero, *u_zero; // [directions]
    const float *row_scale;               // [rows] or null
    int32_t n_classes, directions;
    int32_t v_blocks, u_blocks;
    int32_t rows, row_offset; // which codes of U count, as in packed.Extent
    int32_t y_start;          // its first column of y
};

struct Tenant {
    const Slice *slices;
    int32_t n_slices, first, tokens; // its rows of x and y
};

// t[row][slice's columns] = scale * (q_V x - v_zero * sum x) for all tenants.
// x: [rows][x_stride], zero in front of and behind the codes that count; x_sum: [rows]; t: [rows][t_stride].
void prinmix_shrink(const Tenant *tenants, int n_tenants, const float *x, int64_t x_stride, const float *x_sum, float *t,
                    int64_t t_stride) {
    struct Task {
        const Tenant *tenant;
        const Slice *slice;
        const BitClass *cls;
        int64_t column;
        int tile;
    };
    std::vector<Task> tasks;
    for (const Tenant *tenant = tenants; tenant < tenants + n_tenants; tenant++) {
        int64_t column = 0;
        for (const Slice *slice = tenant->slices; slice < tenant->slices + tenant->n_slices; slice++) {
            for (const BitClass *cls = slice->classes; cls < slice->classes + slice->n_classes; cls++)
                for (int tile = 0; tile * TILE < cls->directions; tile++)
                    tasks.push_back({tenant, slice, cls, column, tile});
            column += slice->directions;
        }
    }
#pragma omp parallel for schedule(dynamic)
    for (const Task &task : tasks) {
        const int n = std::min(TILE, task.cls->directions - task.tile * TILE), blocks = task.slice->v_blocks;
        const int start = task.cls->start + task.tile * TILE;
        for_tokens(task.tenant->tokens, [&](int first, auto tokens) {
            const int64_t row = task.tenant->first + first;
            Floats total[tokens.value] = {};
            for_planes(task.cls->v, task.cls->v_bits, task.cls->directions, blocks,
                       [&](const uint16_t *plane, auto width, float place) {
                           const uint16_t *tile = plane + int64_t(task.tile) * TILE * blocks * 8 * width.value;
                           const float *from = x + row * x_stride;
                           if (n == TILE) // a constant, once inlined
                               dot_plane<width.value, tokens.value>(total, tile, TILE, blocks, from, x_stride, place);
                           else
                               dot_plane<width.value, tokens.value>(total, tile, n, blocks, from, x_stride, place);
                       });
            for (int m = 0; m < tokens.value; m++)
                for (int i = 0; i < n; i++)
                    t[(row + m) * t_stride + task.column + start + i] =
                        task.slice->scale[start + i] * (total[m][i] - task.slice->v_zero[start + i] * x_sum[row + m]);
        });
    }
}

// y[row][slice's columns] += row_scale * (q_U t - sum u_zero t) for all tenants. y: [rows][y_stride].
// t has TILE more floats at its end than it needs.
void prinmix_expand(const Tenant *tenants, int n_tenants, const float *t, int64_t t_stride, float *y, int64_t y_stride) {
    struct Task {
        const Tenant *tenant;
        const Slice *slice;
        int64_t column;
        int block;
        const std::vector<Plane> *planes; // of widths 1, 2 and 4
    };
    std::vector<Task> tasks;
    std::deque<std::array<std::vector<Plane>, 3>> by_width;
    for (const Tenant *tenant = tenants; tenant < tenants + n_tenants; tenant++) {
        int64_t column = 0;
        for (const Slice *slice = tenant->slices; slice < tenant->slices + tenant->n_slices; slice++) {
            auto &planes = by_width.emplace_back();
            for (const BitClass *cls = slice->classes; cls < slice->classes + slice->n_classes; cls++)
                for_planes(cls->u, cls->u_bits, cls->directions, slice->u_blocks,
                           [&](const uint16_t *plane, auto width, float place) {
                               planes[width.value / 2].push_back({plane, cls->directions, cls->start, place});
                           });
            for (int block = 0; block < slice->u_blocks; block++)
                tasks.push_back({tenant, slice, column, block, planes.data()});
            column += slice->directions;
        }
    }
#pragma omp parallel for schedule(dynamic)
    for (const Task &task : tasks) {
        const Slice &slice = *task.slice;
        for_tokens(task.tenant->tokens, [&](int first, auto tokens) {
            const int64_t row = task.tenant->first + first;
            const float *from = t + row * t_stride + task.column;
            float block[tokens.value][BLOCK] = {};
            combine<1, tokens.value>(block[0], task.planes[0], slice.u_blocks, task.block, from, t_stride);
            combine<2, tokens.value>(block[0], task.planes[1], slice.u_blocks, task.block, from, t_stride);
            combine<4, tokens.value>(block[0], task.planes[2], slice.u_blocks, task.block, from, t_stride);
            const int begin = std::max(0, task.block * BLOCK - slice.row_offset);
            const int end = std::min(slice.rows, (task.block + 1) * BLOCK - slice.row_offset);
            for (int m = 0; m < tokens.value; m++) {
                float zero = 0;
                for (int i = 0; i < slice.directions; i++)
                    zero += from[m * t_stride + i] * slice.u_zero[i];
                float *to = y + (row + m) * y_stride + slice.y_start;
                for (int o = begin; o < end; o++) {
                    const float value = block[m][o + slice.row_offset - task.block * BLOCK] - zero;
                    to[o] += slice.row_scale ? value * slice.row_scale[o] : value;
                }
            }
        });
    }
}
}
