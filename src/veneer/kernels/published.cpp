// Weights in published formats as numbers: codes of 4 or 8 bits with a scale, and perhaps a zero
// point, for each group of them. One pass over memory; published.py has the formulas in torch.

#include <cstring>

#include "numbers.h"

namespace {

constexpr Size kChunk = 256;  // codes that are decoded at a time

template <class T>
inline T rounded(float x) {
    if constexpr (std::is_same_v<T, double>) return double(x);
    else return store<T>(x);
}

// Each kind of code: how many bits, and the number that it stands for.
struct FourBits {  // 0 to 15
    static constexpr int bits = 4;
    static float number(std::uint8_t c) { return float(c); }
};
struct EightBits {  // 0 to 255
    static constexpr int bits = 8;
    static float number(std::uint8_t c) { return float(c); }
};
struct SignedBits {  // -128 to 127
    static constexpr int bits = 8;
    static float number(std::uint8_t c) { return float(std::int8_t(c)); }
};
struct E2M1 {  // twice ±0, 0.5, 1, 1.5, 2, 3, 4, 6, whose scales are halved
    static constexpr int bits = 4;
    static float number(std::uint8_t c) {
        const std::uint32_t magnitude = c & 7u, sign = std::uint32_t(c & 8u) << 28;
        const std::uint32_t normal = (magnitude << 22) + (127u << 23);
        const std::uint32_t small = magnitude ? 0x3f800000u : 0u;  // 1, 0
        return std::bit_cast<float>((magnitude < 2 ? small : normal) | sign);
    }
};
struct E4M3 {  // without infinities; ±480 is NaN
    static constexpr int bits = 8;
    static float number(std::uint8_t c) {
        const std::uint32_t magnitude = c & 0x7fu, sign = std::uint32_t(c & 0x80u) << 24;
        const std::uint32_t normal = (magnitude << 20) + (120u << 23);
        const auto small = std::bit_cast<std::uint32_t>(float(magnitude) * 0x1p-9f);
        const std::uint32_t number = magnitude < 8 ? small : normal;
        return std::bit_cast<float>((magnitude == 0x7f ? 0x7fc00000u : number) | sign);
    }
};

// A scale, or 2^(e − 128) for an exponent e of 8 bits: half of what it stands for, which is always a
// number of float32.
inline float scale_of(float s) { return s; }
inline float scale_of(std::uint8_t e) {
    return std::bit_cast<float>(e > 1 ? std::uint32_t(e - 1) << 23 : 0x00200000u << e);
}

// Write `count` codes as bytes; of two in a byte, the lower half is first.
template <class Code>
inline const std::uint8_t* bytes_of(const std::uint8_t* codes, Size count, std::uint8_t* bytes) {
    if constexpr (Code::bits == 8) {
        return codes;
    } else {
        const Size pairs = (count + 1) / 2;
#pragma omp simd
        for (Size i = 0; i < pairs; ++i) {
            bytes[2 * i] = codes[i] & 15;
            bytes[2 * i + 1] = codes[i] >> 4;
        }
        return bytes;
    }
}

// w = (code − zero) · scale. Rows of `stride` bytes of codes; the scales, and zeros if there are
// any, are (rows / row_block, groups) for groups of `group` columns. `group_of`, if given, is the
// group of each column instead.
template <class Code, class Scale, class T>
void by_rows(const std::uint8_t* codes, const Scale* scales, const float* zeros,
             const std::int32_t* group_of, T* w, Size rows, Size cols, Size stride, Size row_block,
             Size groups, Size group, double offset) {
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size row = 0; row < rows; ++row) {
        const std::uint8_t* line = codes + row * stride;
        const Scale* scale = scales + row / row_block * groups;
        const float* zero = zeros ? zeros + row / row_block * groups : nullptr;
        T* out = w + row * cols;
        std::uint8_t buffer[kChunk];
        if (group_of) {
            for (Size first = 0; first < cols; first += kChunk) {
                const Size n = cols - first < kChunk ? cols - first : kChunk;
                const auto* bytes = bytes_of<Code>(line + first * Code::bits / 8, n, buffer);
                for (Size i = 0; i < n; ++i) {
                    const Size g = group_of[first + i];
                    const float z = zero ? zero[g] : float(offset);
                    out[first + i] = rounded<T>((Code::number(bytes[i]) - z) * scale_of(scale[g]));
                }
            }
            continue;
        }
        for (Size g = 0; g < groups; ++g) {
            const Size end = (g + 1) * group < cols ? (g + 1) * group : cols;
            const float s = scale_of(scale[g]), z = zero ? zero[g] : float(offset);
            for (Size first = g * group; first < end; first += kChunk) {
                const Size n = end - first < kChunk ? end - first : kChunk;
                const auto* bytes = bytes_of<Code>(line + first * Code::bits / 8, n, buffer);
                T* y = out + first;
#pragma omp simd
                for (Size i = 0; i < n; ++i) y[i] = rounded<T>((Code::number(bytes[i]) - z) * s);
            }
        }
    }
}

// Words of 32 bits whose codes belong to one row of w and to columns side by side, the lowest bits
// first, as GPTQ has them: word (k, row) holds the columns k · 32 / bits and on. `stride` is the
// words of a line of all rows; scales and zeros are (groups, rows).
template <int bits, class T>
void by_columns(const std::uint32_t* words, const float* scales, const float* zeros,
                const std::int32_t* group_of, T* w, Size rows, Size cols, Size stride, Size group) {
    constexpr Size kWord = 32 / bits, kTile = 64, kColumns = 128;
    constexpr std::uint32_t kMask = (1u << bits) - 1;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size top = 0; top < rows; top += kTile) {
        const Size bottom = top + kTile < rows ? top + kTile : rows;
        for (Size left = 0; left < cols; left += kColumns) {
            const Size right = left + kColumns < cols ? left + kColumns : cols;
            // Whether all these columns are of one group, so that its scale is read once.
            bool alike = !group_of && left / group == (right - 1) / group;
            if (group_of) {
                alike = true;
                for (Size i = left + 1; i < right; ++i) alike &= group_of[i] == group_of[left];
            }
            for (Size row = top; row < bottom; ++row) {
                T* out = w + row * cols;
                if (alike) {
                    const Size g = group_of ? group_of[left] : left / group;
                    const float s = scales[g * rows + row], z = zeros[g * rows + row];
                    for (Size i = left; i < right; i += kWord) {
                        const std::uint32_t word = words[i / kWord * stride + row];
#pragma omp simd
                        for (Size j = 0; j < kWord; ++j)
                            out[i + j] = rounded<T>((float(word >> bits * j & kMask) - z) * s);
                    }
                } else {
                    for (Size i = left; i < right; i += kWord) {
                        const std::uint32_t word = words[i / kWord * stride + row];
                        for (Size j = 0; j < kWord; ++j) {
                            const Size g = group_of ? group_of[i + j] : (i + j) / group;
                            const float s = scales[g * rows + row], z = zeros[g * rows + row];
                            out[i + j] = rounded<T>((float(word >> bits * j & kMask) - z) * s);
                        }
                    }
                }
            }
        }
    }
}

// Words of eight 4-bit codes whose codes belong to one column of w and to rows side by side, as AWQ
// has them: the codes of rows 0, 2, 4, 6, 1, 3, 5, 7, the lowest bits first. Word (column, k) holds
// the rows 8 k and on.
template <class T>
void interleaved(const std::uint32_t* words, const float* scales, const float* zeros, T* w,
                 Size rows, Size cols, Size stride, Size group) {
    constexpr Size kTile = 128, kColumns = 64;
    constexpr Size kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size top = 0; top < rows; top += kTile) {
        const Size height = rows - top < kTile ? rows - top : kTile;
        std::uint8_t tile[kTile][kColumns];
        for (Size left = 0; left < cols; left += kColumns) {
            const Size width = cols - left < kColumns ? cols - left : kColumns;
            for (Size i = 0; i < width; ++i) {
                const std::uint32_t* line = words + (left + i) * stride + top / 8;
                for (Size k = 0; k < height / 8; ++k)
                    for (Size j = 0; j < 8; ++j)
                        tile[8 * k + kOrder[j]][i] = line[k] >> 4 * j & 15;
            }
            for (Size row = 0; row < height; ++row) {
                T* out = w + (top + row) * cols + left;
                for (Size first = 0; first < width;) {
                    const Size g = (left + first) / group, end = (g + 1) * group - left;
                    const Size last = end < width ? end : width;
                    const float s = scales[g * rows + top + row], z = zeros[g * rows + top + row];
#pragma omp simd
                    for (Size i = first; i < last; ++i)
                        out[i] = rounded<T>((float(tile[row][i]) - z) * s);
                    first = last;
                }
            }
        }
    }
}

}  // namespace

#define BY_ROWS(code, Code, Scale, name, T)                                                        \
    extern "C" void code##_##name(const std::uint8_t* codes, const Scale* scales,                  \
                                  const float* zeros, const std::int32_t* group_of, T* w,          \
                                  Size rows, Size cols, Size stride, Size row_block, Size groups,  \
                                  Size group, double offset) {                                     \
        by_rows<Code>(codes, scales, zeros, group_of, w, rows, cols, stride, row_block, groups,    \
                      group, offset);                                                              \
    }
#define BY_COLUMNS(bits, name, T)                                                                  \
    extern "C" void columns##bits##_##name(                                                        \
        const std::uint32_t* words, const float* scales, const float* zeros,                       \
        const std::int32_t* group_of, T* w, Size rows, Size cols, Size stride, Size group) {       \
        by_columns<bits>(words, scales, zeros, group_of, w, rows, cols, stride, group);            \
    }
#define EXPORTED(name, T)                                                                          \
    BY_ROWS(uint4, FourBits, float, name, T)                                                       \
    BY_ROWS(uint8, EightBits, float, name, T)                                                      \
    BY_ROWS(int8, SignedBits, float, name, T)                                                      \
    BY_ROWS(e4m3, E4M3, float, name, T)                                                            \
    BY_ROWS(e2m1, E2M1, std::uint8_t, name, T)                                                     \
    BY_COLUMNS(4, name, T)                                                                         \
    BY_COLUMNS(8, name, T)                                                                         \
    extern "C" void interleaved_##name(const std::uint32_t* words, const float* scales,            \
                                       const float* zeros, T* w, Size rows, Size cols,             \
                                       Size stride, Size group) {                                  \
        interleaved(words, scales, zeros, w, rows, cols, stride, group);                           \
    }

FOR_EACH_DTYPE(EXPORTED)
