/* Unpacking of a tile in plain C++, for instruction sets without mask registers. */

template <int kBits>
void unpack_chunks(const uint8_t* stream, int64_t chunks, uint8_t* codes) {
  constexpr Parts parts = parts_of(kBits);
  for (int64_t c = 0; c < chunks; ++c, codes += kChunkCodes) {
    for (int i = 0; i < kChunkCodes; ++i) codes[i] = 0;
    int shift = 0;
    if (parts.nibbles) {
      for (int i = 0; i < kChunkCodes / 2; ++i) {
        codes[i] = stream[i] & 15;
        codes[i + kChunkCodes / 2] = stream[i] >> 4;
      }
      stream += kChunkCodes / 2;
      shift = 4;
    }
    if (parts.pairs) {
      for (int j = 0; j < kVectors; ++j)
        for (int i = 0; i < kVector; ++i)
          codes[j * kVector + i] =
              uint8_t(codes[j * kVector + i] | ((stream[i] >> (2 * j) & 3) << shift));
      stream += kVector;
      shift += 2;
    }
    if (parts.singles) {
      for (int i = 0; i < kChunkCodes / 8; ++i) {
        uint64_t eight;
        __builtin_memcpy(&eight, codes + 8 * i, 8);
        eight |= spread_bits(stream[i]) << shift;
        __builtin_memcpy(codes + 8 * i, &eight, 8);
      }
      stream += kChunkCodes / 8;
    }
  }
}

void unpack_tile(const uint8_t* stream, int bits, int64_t chunks, uint8_t* codes) {
  switch (bits) {
    case 2: return unpack_chunks<2>(stream, chunks, codes);
    case 3: return unpack_chunks<3>(stream, chunks, codes);
    case 4: return unpack_chunks<4>(stream, chunks, codes);
    case 5: return unpack_chunks<5>(stream, chunks, codes);
    case 6: return unpack_chunks<6>(stream, chunks, codes);
    default: return unpack_chunks<7>(stream, chunks, codes);
  }
}

bool can_multiply_packed(int64_t, const treeq_layer_format&) { return false; }
void multiply_packed(const uint8_t*, const int32_t*, int, int64_t, const treeq_layer_format&,
                     int32_t*) {}
