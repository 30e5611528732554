#include "comm/fault/process_state.h"

#include <fstream>
#include <string>

namespace mlsys::comm {

bool is_stopped(int pidfd) {
  std::ifstream info("/proc/self/fdinfo/" + std::to_string(pidfd));
  long pid = 0;
  for (std::string field; info >> field;) {
    if (field == "Pid:") info >> pid;
  }
  if (pid <= 0) return false;
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(stat, line);
  const size_t name_ends = line.rfind(") ");  // a process's name may hold anything
  if (name_ends == std::string::npos || name_ends + 2 >= line.size()) return false;
  const char state = line[name_ends + 2];
  return state == 'T' || state == 't';
}

}  // namespace mlsys::comm
