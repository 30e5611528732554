#include "comm/bringup/liveness.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "comm/fault/process_state.h"

namespace mlsys::comm {

void Liveness::add(int rank, int global_rank, const Identity& theirs, const Identity& mine) {
  const bool watchable = theirs.boot_id == mine.boot_id && !mine.process_space.empty() &&
                         theirs.process_space == mine.process_space && theirs.pid != mine.pid;
  if (!watchable) return;
  UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(theirs.pid), 0)));
  if (!pidfd && errno != ESRCH) return;  // not permitted here: cannot be watched
  peers_.insert_or_assign(rank, Peer{global_rank, theirs.host, theirs.pid, std::move(pidfd)});
}

bool Liveness::is_dead(int rank) const {
  const auto entry = peers_.find(rank);
  if (entry == peers_.end()) return false;
  if (!entry->second.pidfd) return true;
  pollfd waiting{entry->second.pidfd.get(), POLLIN, 0};
  return ::poll(&waiting, 1, 0) > 0;
}

void Liveness::sleep(int rank, std::chrono::milliseconds pause) const {
  std::vector<pollfd> polls;
  for (const auto& [watched, peer] : peers_) {
    if (peer.pidfd && (rank < 0 || rank == watched)) polls.push_back({peer.pidfd.get(), POLLIN, 0});
  }
  if (::poll(polls.data(), polls.size(), static_cast<int>(pause.count())) < 0 && errno != EINTR)
    throw_errno("poll of peers");
}

int Liveness::first_dead(std::chrono::milliseconds grace) const {
  std::vector<pollfd> polls;
  for (const auto& [rank, peer] : peers_) {
    if (!peer.pidfd) return rank;
    polls.push_back({peer.pidfd.get(), POLLIN, 0});
  }
  if (polls.empty() || ::poll(polls.data(), polls.size(), static_cast<int>(grace.count())) <= 0) return -1;
  auto revents = polls.begin();
  for (const auto& [rank, peer] : peers_) {
    if ((revents++)->revents != 0) return rank;
  }
  return -1;
}

int Liveness::first_stopped() const {
  for (const auto& [rank, peer] : peers_) {
    if (peer.pidfd && is_stopped(peer.pidfd.get())) return rank;
  }
  return -1;
}

PeerFailed Liveness::failure_of(int rank) const {
  const Peer& peer = peers_.at(rank);
  return PeerFailed(peer.global_rank, peer.host, peer.pid, "its process died while the group was connecting",
                    "connecting", 0);
}

}  // namespace mlsys::comm
