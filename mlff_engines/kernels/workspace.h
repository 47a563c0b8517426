// Memory for the arrays of one call, kept by the thread for its next one: fresh pages cost as much as a layer.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mlff {

class Workspace {
 public:
  static Workspace& of_this_thread()
  {
    static thread_local Workspace workspace;
    return workspace;
  }

  ~Workspace() { release(); }

  void* take(size_t bytes)
  {
    bytes = (bytes + LINE - 1) / LINE * LINE;
    taken_ += bytes;
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
      grow(bytes > wanted_ ? bytes : wanted_);
      used_ = 0;
    }
    return static_cast<char*>(blocks_.back().data) + std::exchange(used_, used_ + bytes);
  }

  // Everything taken is free again. The next call finds one block that would have held it all.
  void reset()
  {
    if (blocks_.size() > 1 || (!blocks_.empty() && blocks_.back().size / 4 > taken_ + SMALL)) {
      release();
      wanted_ = taken_;
    }
    used_ = taken_ = 0;
  }

 private:
  static constexpr size_t LINE = 64, PAGE = size_t(2) << 20, SMALL = size_t(16) << 20;

  struct Block {
    void* data;
    size_t size;
  };

  void grow(size_t bytes)
  {
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    void* data = std::aligned_alloc(PAGE, bytes);
    if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(data, bytes, MADV_HUGEPAGE);  // gathers miss the address cache less often; no matter if refused
#endif
    blocks_.push_back({data, bytes});
  }

  void release()
  {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
  }

  std::vector<Block> blocks_;
  size_t used_ = 0, taken_ = 0, wanted_ = 0;
};

// An array in the workspace of the thread that makes it, not set to zero.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(Workspace::of_this_thread().take(size * sizeof(T)))) {}
  T* get() const { return data_; }
  T& operator[](int64_t k) const { return data_[k]; }

 private:
  T* data_;
};

}  // namespace mlff
