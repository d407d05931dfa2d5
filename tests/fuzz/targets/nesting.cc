// Pickle streams, looked through for what no unpickler can stand.
#include "nesting.h"

#include "fuzz.h"

namespace fastsd::fuzz {

FUZZ_TARGET(nesting) {
  const char* problem = find_bad_nesting(input);
  require(problem == nullptr || *problem != '\0', "what is wrong is said");
}

}  // namespace fastsd::fuzz
