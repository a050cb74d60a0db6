// A tenant's packed factors at one site of the model, described by native.py and cut into tasks once.

#pragma once

#include <memory>

#include "cpu_planes.h"

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
inline std::vector<Plane> planes_of(const uint16_t *at, int bits, int n, int blocks, int start) {
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

// A tenant's factors at a site from their description, which may go afterwards while the packed bytes stay.
// t_given: only expand is wanted, as of an embedding.
inline std::unique_ptr<Factors> prepare(const Slice *slices, int n_slices, int cols, int col_offset, const float *bias,
                                        bool t_given) {
    auto factors = std::make_unique<Factors>();
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
