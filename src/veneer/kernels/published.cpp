// Weights in published formats as numbers: codes of 4 or 8 bits with a scale, and perhaps a zero
// point, for each group of them. One pass over memory; published.py has the formulas in torch.

#include <cstring>

#include "numbers.h"

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

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
    static constexpr float number(std::uint8_t c) { return float(c); }
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
    static constexpr float number(std::uint8_t c) {
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

// (code − zero) · scale of codes in bytes; of a count that the compiler knows, if it is not 0.
template <class Code, Size known, class T>
inline void decode_block(const std::uint8_t* bytes, T* out, Size count, float scale, float zero) {
    const Size n = known ? known : count;
#pragma omp simd
    for (Size i = 0; i < n; ++i) out[i] = rounded<T>((Code::number(bytes[i]) - zero) * scale);
}

struct Sixteen {
    float values[16];
};

template <class Code>
constexpr Sixteen numbers_of() {
    Sixteen numbers{};
    for (int i = 0; i < 16; ++i) numbers.values[i] = Code::number(std::uint8_t(i));
    return numbers;
}

// The same by a table of the sixteen numbers that codes of four bits may be.
template <class Code, class T>
inline void look_up(const std::uint8_t* bytes, T* out, Size count, float scale, float zero) {
    static constexpr auto kNumbers = numbers_of<Code>();
    alignas(64) T table[16];
#pragma omp simd
    for (Size i = 0; i < 16; ++i) table[i] = rounded<T>((kNumbers.values[i] - zero) * scale);
    Size i = 0;
#ifdef __AVX512BW__
    if constexpr (sizeof(T) == 2) {
        const __m512i numbers = _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)table));
        for (; i + 32 <= count; i += 32) {
            const auto* at = (const __m256i*)(bytes + i);
            const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(codes, numbers));
        }
    } else if constexpr (sizeof(T) == 4) {
        const __m512i numbers = _mm512_load_si512(table);
        for (; i + 16 <= count; i += 16) {
            const auto* at = (const __m128i*)(bytes + i);
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(at));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(codes, numbers));
        }
    }
#endif
    for (; i < count; ++i) out[i] = table[bytes[i]];
}

// The numbers of one group from `bytes` on.
template <class Code, class T>
inline void decode(const std::uint8_t* bytes, T* out, Size count, float scale, float zero) {
    if constexpr (Code::bits == 4) {
        if (count >= 32) return look_up<Code>(bytes, out, count, scale, zero);
    }
    if (count >= 64) return decode_block<Code, 0>(bytes, out, count, scale, zero);
    Size first = 0;
    for (; first + 32 <= count; first += 32)
        decode_block<Code, 32>(bytes + first, out + first, 32, scale, zero);
    if (first < count) decode_block<Code, 0>(bytes + first, out + first, count - first, scale, zero);
}

// Write `count` codes as bytes; of two in a byte, the lower half is first.
template <class Code>
inline const std::uint8_t* bytes_of(const std::uint8_t* codes, Size count, std::uint8_t* bytes) {
    if constexpr (Code::bits == 8) return codes;
    const auto halves = [=](Size pairs) {
#pragma omp simd
        for (Size i = 0; i < pairs; ++i) {
            bytes[2 * i] = codes[i] & 15;
            bytes[2 * i + 1] = codes[i] >> 4;
        }
    };
    count == kChunk ? halves(kChunk / 2) : halves((count + 1) / 2);
    return bytes;
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
        std::uint8_t buffer[kChunk];
        Size g = 0, end = group;
        for (Size first = 0; first < cols; first += kChunk) {
            const Size n = cols - first < kChunk ? cols - first : kChunk;
            const auto* bytes = bytes_of<Code>(line + first * Code::bits / 8, n, buffer);
            T* out = w + row * cols + first;
            for (Size i = 0; i < n;) {
                Size count = 1;
                if (group_of) {
                    g = group_of[first + i];
                } else {
                    if (first + i == end) ++g, end += group;
                    count = end - first < n ? end - first - i : n - i;
                }
                const float z = zero ? zero[g] : float(offset);
                decode<Code>(bytes + i, out + i, count, scale_of(scale[g]), z);
                i += count;
            }
        }
    }
}

constexpr Size kTile = 64, kWide = 128;  // rows and columns that are decoded together

// A row of a tile of codes, decoded; `left` is the first of its columns.
template <class Code, class T>
inline void decode_row(const std::uint8_t* bytes, T* out, Size left, Size width, Size group,
                       const float* scales, const float* zeros, Size stride) {
    for (Size i = 0; i < width;) {
        const Size g = (left + i) / group, end = (g + 1) * group - left;
        const Size count = (end < width ? end : width) - i;
        decode<Code>(bytes + i, out + i, count, scales[g * stride], zeros[g * stride]);
        i += count;
    }
}

// The eight codes of four bits in a word as bytes, the lowest bits first.
inline std::uint64_t spread(std::uint32_t word) {
    std::uint64_t x = word;
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
}

// Words of 32 bits whose codes belong to one row of w and to columns side by side, the lowest bits
// first, as GPTQ has them: word (k, row) holds the columns k · 32 / bits and on. `stride` is the
// words of a line of all rows; scales and zeros are (groups, rows).
template <int bits, class T>
void by_columns(const std::uint32_t* words, const float* scales, const float* zeros,
                const std::int32_t* group_of, T* w, Size rows, Size cols, Size stride, Size group) {
    using Code = std::conditional_t<bits == 4, FourBits, EightBits>;
    constexpr Size kWord = 32 / bits;
    constexpr std::uint32_t kMask = (1u << bits) - 1;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size top = 0; top < rows; top += kTile) {
        const Size height = rows - top < kTile ? rows - top : kTile;
        alignas(64) std::uint8_t tile[kTile][kWide];
        alignas(64) T numbers[kWide][kTile];
        for (Size left = 0; left < cols; left += kWide) {
            const Size width = cols - left < kWide ? cols - left : kWide;
            T* out = w + top * cols + left;
            const std::uint32_t* line = words + left / kWord * stride + top;
            if (group_of) {  // a column at a time, and then turned
                for (Size i = 0; i < width; ++i) {
                    const std::uint32_t* word = line + i / kWord * stride;
                    const Size shift = i % kWord * bits;
                    const float* s = scales + group_of[left + i] * rows + top;
                    const float* z = zeros + group_of[left + i] * rows + top;
#pragma omp simd
                    for (Size row = 0; row < height; ++row)
                        numbers[i][row] =
                            rounded<T>((float(word[row] >> shift & kMask) - z[row]) * s[row]);
                }
                for (Size row = 0; row < height; ++row)
                    for (Size i = 0; i < width; ++i) out[row * cols + i] = numbers[i][row];
                continue;
            }
            for (Size i = 0; i < width; i += kWord, line += stride) {
                for (Size row = 0; row < height; ++row) {
                    if constexpr (bits == 4) {
                        const std::uint64_t codes = spread(line[row]);
                        std::memcpy(&tile[row][i], &codes, sizeof codes);
                    } else {
                        std::memcpy(&tile[row][i], &line[row], sizeof line[row]);
                    }
                }
            }
            for (Size row = 0; row < height; ++row)
                decode_row<Code>(tile[row], out + row * cols, left, width, group,
                                 scales + top + row, zeros + top + row, rows);
        }
    }
}

// Turn eight rows of eight bytes, for each k; a[r][k] is row r of them.
template <Size count>
inline void turn(std::uint64_t (&a)[8][count]) {
    const auto swap = [&](int apart, int shift, std::uint64_t mask) {
        for (int r = 0; r < 8; ++r) {
            if (r & apart) continue;
#pragma omp simd
            for (Size k = 0; k < count; ++k) {
                const std::uint64_t t = ((a[r][k] >> shift) ^ a[r + apart][k]) & mask;
                a[r + apart][k] ^= t;
                a[r][k] ^= t << shift;
            }
        }
    };
    swap(4, 32, 0x00000000ffffffffu);
    swap(2, 16, 0x0000ffff0000ffffu);
    swap(1, 8, 0x00ff00ff00ff00ffu);
}

// Words of eight 4-bit codes whose codes belong to one column of w and to rows side by side, as AWQ
// has them: the codes of rows 0, 2, 4, 6, 1, 3, 5, 7, the lowest bits first. Word (column, k) holds
// the rows 8 k and on.
template <class T>
void interleaved(const std::uint32_t* words, const float* scales, const float* zeros, T* w,
                 Size rows, Size cols, Size stride, Size group) {
    constexpr Size kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7}, kWords = kTile / 8;
#pragma omp parallel for schedule(static) if (rows * cols > kWorthSharing)
    for (Size top = 0; top < rows; top += kTile) {
        const Size height = rows - top < kTile ? rows - top : kTile;
        alignas(64) std::uint8_t tile[kTile][kWide + 8];
        alignas(64) std::uint64_t codes[8][kWords] = {};
        for (Size left = 0; left < cols; left += kWide) {
            const Size width = cols - left < kWide ? cols - left : kWide;
            for (Size first = 0; first < width; first += 8) {
                const Size lines = width - first < 8 ? width - first : 8;
                for (Size r = 0; r < lines; ++r) {
                    const std::uint32_t* line = words + (left + first + r) * stride + top / 8;
                    for (Size k = 0; k < height / 8; ++k) codes[r][k] = spread(line[k]);
                }
                turn(codes);
                for (Size j = 0; j < 8; ++j)
                    for (Size k = 0; k < kWords; ++k)
                        std::memcpy(&tile[8 * k + kOrder[j]][first], &codes[j][k], 8);
            }
            for (Size row = 0; row < height; ++row)
                decode_row<FourBits>(tile[row], w + (top + row) * cols + left, left, width, group,
                                     scales + top + row, zeros + top + row, rows);
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
