// SPDX-License-Identifier: Apache-2.0
// Result of every operation of the core: an error code and a message. Nothing throws or aborts
// across the library boundary, and building a Status never allocates.
#pragma once

#include <cstdarg>
#include <cstdio>

#if defined(_WIN32)
#define SINKATTN_API
#else
#define SINKATTN_API __attribute__((visibility("default")))
#endif

namespace sinkattn {

/// What went wrong. The names are the Python exceptions the binding raises for them.
enum class StatusCode : int {
  ok = 0,
  type_error,       ///< wrong dtype, mixed dtypes, wrong device
  value_error,      ///< shape, range, layout, contradictory options
  not_implemented,  ///< a valid request that this build or backend cannot serve
  runtime_error,    ///< CUDA error, no usable GPU, workspace too small
};

/// Error code plus text `<argument>: expected <what>, got <what>`.
class [[nodiscard]] Status {
 public:
  static constexpr int max_message = 512;

  Status() { message_[0] = '\0'; }

  /// printf-style construction; the text is cut at max_message - 1 bytes.
  __attribute__((format(printf, 2, 3))) static Status error(StatusCode code, const char* format,
                                                            ...) {
    Status status;
    status.code_ = code;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(status.message_, max_message, format, arguments);
    va_end(arguments);
    return status;
  }

  bool ok() const { return code_ == StatusCode::ok; }
  StatusCode code() const { return code_; }
  const char* message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::ok;
  char message_[max_message];
};

/// Returns the Status of `expression` from the enclosing function unless it is ok.
#define SINKATTN_RETURN_IF_ERROR(expression)             \
  do {                                                   \
    ::sinkattn::Status sinkattn_status_ = (expression);  \
    if (!sinkattn_status_.ok()) return sinkattn_status_; \
  } while (false)

}  // namespace sinkattn
