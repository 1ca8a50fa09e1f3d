// Memory that shares no cache line with other memory.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace gqa::cpu {

constexpr int64_t kFloatsPerLine = 16;

class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t n)
      : data_(static_cast<float*>(::operator new(n * sizeof(float), kAlignment))), size_(n) {}
  ~AlignedFloats() { ::operator delete(data_, kAlignment); }
  AlignedFloats(AlignedFloats&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  AlignedFloats& operator=(AlignedFloats&& other) noexcept {
    AlignedFloats old(std::move(*this));
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;

  float* get() const { return data_; }
  int64_t size() const { return size_; }

  // Makes room for n floats. If there was less room, the old contents are lost.
  void reserve(int64_t n) {
    if (n <= size_) return;
    *this = AlignedFloats();  // never both at once
    *this = AlignedFloats(n);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace gqa::cpu
