// Scratch memory for the length of one call: aligned to cache lines, never zeroed unless asked.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace drystone {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count > 0 ? count : 1), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

}  // namespace drystone
