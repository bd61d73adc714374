// The samples of a batch from their places in open files, in one call: from Python, every read would give the
// interpreter's lock away and wait for it again, behind the thread that launches the training step.

#include <cerrno>
#include <cstdint>

#include <unistd.h>

// out: [num, size] bytes. Row i comes from byte offset[i] of the file descriptor[i]. failed[i]: 1 where the file ended
// early or an error came, and the row may hold anything; else 0. Returns how many failed.
extern "C" int64_t speed_read_rows(uint8_t* out, const int64_t* descriptor, const int64_t* offset, uint8_t* failed,
                                   int64_t num, int64_t size) {
  int64_t num_failed = 0;
  for (int64_t i = 0; i < num; ++i) {
    int64_t done = 0;
    while (done < size) {
      const ssize_t got = pread(static_cast<int>(descriptor[i]), out + i * size + done,
                                static_cast<size_t>(size - done), static_cast<off_t>(offset[i] + done));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      done += got;
    }
    failed[i] = done < size;
    num_failed += failed[i];
  }
  return num_failed;
}
