#include <algorithm>
#include <stdexcept>

#include "comm/bringup/links.h"
#include "comm/bringup/locality.h"
#include "comm/bringup/rendezvous.h"
#include "comm/fault/control_frame.h"

namespace mlsys::comm {
namespace {

using Deadline = std::chrono::steady_clock::time_point;

int global_rank(const Options& options, int rank) {
  return options.global_ranks.empty() ? rank : options.global_ranks[static_cast<size_t>(rank)];
}

int locality_of(const Options& options, int rank) {
  if (options.locality.empty()) return -1;
  const auto global = static_cast<size_t>(global_rank(options, rank));
  if (global >= options.locality.size()) {
    throw std::invalid_argument("MLSYS_LOCALITY names the hosts of " +
                                std::to_string(options.locality.size()) +
                                " ranks, but there is a global rank " + std::to_string(global) +
                                ". Give one number for each rank of the job.");
  }
  return options.locality[global];
}

std::vector<Identity> exchange_identities(Rendezvous& rendezvous, const Options& options,
                                          const Identity& mine, Liveness& liveness) {
  rendezvous.put("identity", options.rank, encode(mine));
  std::vector<Identity> identities;
  for (int rank = 0; rank < options.size; ++rank) {
    const std::optional<Identity> identity = decode_identity(rendezvous.get("identity", rank, true));
    if (!identity) {
      throw std::runtime_error("what group rank " + std::to_string(rank) +
                               " published in the store is not readable. All ranks must run the same build.");
    }
    if (!identity->failure.empty()) {
      throw PeerFailed(global_rank(options, rank), identity->host, identity->pid, identity->failure,
                       "connecting", 0);
    }
    liveness.add(rank, global_rank(options, rank), *identity, mine);
    identities.push_back(*identity);
  }
  return identities;
}

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

struct PublishedAddress {
  std::string host;
  uint16_t data_port = 0;
  uint16_t message_port = 0;
  int sockets_per_peer = 0;
};

// "address|data port|message port|sockets per peer"
std::vector<uint8_t> encode(const PublishedAddress& address) {
  return bytes_of(address.host + "|" + std::to_string(address.data_port) + "|" +
                  std::to_string(address.message_port) + "|" + std::to_string(address.sockets_per_peer));
}

PublishedAddress decode_address(const std::vector<uint8_t>& bytes) {
  const std::string text(bytes.begin(), bytes.end());
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == '|') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  if (parts.size() != 4) throw std::runtime_error("bad address in the store: " + text);
  return {parts[0], static_cast<uint16_t>(std::stoul(parts[1])), static_cast<uint16_t>(std::stoul(parts[2])),
          std::stoi(parts[3])};
}

void exchange_addresses(Rendezvous& rendezvous, Links& links, const std::vector<Identity>& identities,
                        const Options& options) {
  const int sockets_per_peer = options.sockets_per_peer;
  const bool one_kernel = std::all_of(identities.begin(), identities.end(), [&](const Identity& identity) {
    return identity.boot_id == identities[0].boot_id && identity.network_space == identities[0].network_space;
  });
  PublishedAddress mine{choose_address(one_kernel), 0, 0, sockets_per_peer};
  UniqueFd data_listener = listen_tcp(mine.host, &mine.data_port);
  links.message_tcp_listener = listen_tcp(mine.host, &mine.message_port);
  rendezvous.put("address", links.topology.rank, encode(mine));
  std::vector<TcpAddress> data(links.topology.members.size());
  for (int rank = 0; rank < links.topology.size; ++rank) {
    if (links.topology.is_local(rank)) continue;
    const PublishedAddress theirs = decode_address(rendezvous.get("address", rank, false));
    if (theirs.sockets_per_peer != sockets_per_peer) {
      throw std::invalid_argument(
          "rank " + std::to_string(links.topology.global(links.topology.rank)) + " opens " +
          std::to_string(sockets_per_peer) + " sockets to each peer and rank " +
          std::to_string(links.topology.global(rank)) + " " + std::to_string(theirs.sockets_per_peer) +
          ". Both ends need the same number. Set MLSYS_SOCKETS_PER_PEER to the same "
          "value on all ranks, or nowhere.");
    }
    const auto slot = static_cast<size_t>(rank);
    data[slot] = {theirs.host, theirs.data_port};
    links.message_endpoints[slot].tcp = {theirs.host, theirs.message_port};
  }
  links.mesh =
      std::make_unique<Mesh>(links.topology, *links.faults, links.credentials, links.strangers,
                             std::move(data), std::move(data_listener), sockets_per_peer,
                             options.make_carrier ? options.make_carrier(CarrierUse::kCollectives) : nullptr);
}

// The ranks of other hosts that this rank keeps a control connection to. The k-th ranks of two hosts pair up,
// the smaller host being counted round and round: every rank of either host is in a pair.
std::vector<int> control_peers(const Topology& topology) {
  std::vector<int> peers;
  const int mine = topology.local_index(), num_mine = topology.local_size();
  for (int host = 0; host < topology.num_hosts(); ++host) {
    if (host == topology.my_host()) continue;
    const std::vector<int>& theirs = topology.hosts[static_cast<size_t>(host)];
    const auto num_theirs = static_cast<int>(theirs.size());
    for (int k = mine; k < std::max(num_mine, num_theirs); k += num_mine) {
      const int peer = theirs[static_cast<size_t>(k % num_theirs)];
      if (std::find(peers.begin(), peers.end(), peer) == peers.end()) peers.push_back(peer);
    }
  }
  return peers;
}

std::map<int, Socket> open_controls(Links& links, Rendezvous& rendezvous, const Liveness& liveness,
                                    Deadline deadline) {
  std::map<int, Socket> controls;
  if (links.mesh == nullptr) return controls;
  const std::vector<int> peers = control_peers(links.topology);
  Descriptor op;
  op.rank = links.topology.global(links.topology.rank);
  links.mesh->begin(op, deadline);
  links.mesh->ensure(peers, Purpose::kControl, [&](int rank) {
    if (liveness.is_dead(rank)) return true;
    rendezvous.heed_failures();
    return false;
  });
  for (const int peer : peers) controls.emplace(peer, links.mesh->take_control(peer));
  return controls;
}

void share_memory(Links& links, SharedHost& shared) {
  const Topology& topology = links.topology;
  links.block = std::make_unique<ControlBlock>(shared.control, topology.local_size(), topology.size);
  links.faults = std::make_unique<Faults>(topology, *links.block, std::move(shared.doorbells));
  std::vector<std::byte*> bases;
  std::vector<size_t> sizes;
  for (int local = 0; local < topology.local_size(); ++local) {
    const int fd = shared.arenas[static_cast<size_t>(local)].get();
    const bool own = local == topology.local_index();
    links.peer_arenas.push_back(own ? Mapping() : Mapping(fd, file_bytes(fd)));
    if (!own) links.peer_arenas.back().advise_huge_pages();
    bases.push_back(own ? links.arena->base() : links.peer_arenas.back().data());
    sizes.push_back(own ? links.arena->capacity() : links.peer_arenas.back().bytes());
  }
  links.team =
      std::make_unique<LocalTeam>(topology, *links.block, *links.faults, std::move(bases), std::move(sizes));
}

void connect_all(Links* links, Rendezvous& rendezvous, const Options& options, const Identity& mine,
                 Liveness& liveness, const std::function<bool()>& stop, std::function<void()> on_message,
                 std::function<void()> on_failure) {
  const Deadline deadline = std::chrono::steady_clock::now() + options.timeout;
  links->arena = Arena::of_process();
  links->credentials = {options.job_key, options.rank, options.size, hash_name(options.group_name)};

  UniqueFd locality_listener = listen_unix(mine.socket_name);
  links->message_unix_listener = listen_unix(mine.message_socket);
  const std::vector<Identity> identities = exchange_identities(rendezvous, options, mine, liveness);

  Topology& topology = links->topology;
  topology.rank = options.rank;
  topology.size = options.size;
  for (int rank = 0; rank < options.size; ++rank) {
    const Identity& identity = identities[static_cast<size_t>(rank)];
    topology.members.push_back({global_rank(options, rank), identity.host, identity.pid});
    links->message_endpoints.push_back({identity.message_socket, {}});
    // Elsewhere its pid may be another process's.
    links->readable.push_back(!mine.process_space.empty() && identity.process_space == mine.process_space);
  }
  SharedHost shared =
      prove_locality(rendezvous, links->credentials, links->strangers, identities,
                     std::move(locality_listener), links->arena->fd(), stop, liveness, deadline);
  topology.hosts = shared.hosts;
  index_hosts(topology);
  share_memory(*links, shared);
  if (topology.num_hosts() > 1) {
    exchange_addresses(rendezvous, *links, identities, options);
  }
  std::map<int, Socket> controls = open_controls(*links, rendezvous, liveness, deadline);
  std::vector<int> listeners{links->message_unix_listener.get()};
  if (links->message_tcp_listener) listeners.push_back(links->message_tcp_listener.get());
  links->watch = std::make_unique<Watch>(topology, *links->block, *links->faults, std::move(shared.pidfds),
                                         std::move(controls), std::move(listeners), std::move(on_message),
                                         std::move(on_failure));
}

// Tells the ranks that may have connected already, which ask the store no more, before the connections to
// them end.
[[noreturn]] void give_up(Rendezvous& rendezvous, const Links& links, const Poison& mine) {
  const bool known = links.faults != nullptr && links.faults->poisoned();
  Poison found = known ? links.faults->record() : mine;
  // The connections know whom they wait for, not that it waits for somebody else, who is stopped.
  if (known && found.kind == PoisonKind::kTimedOut) {
    if (const int stopped = rendezvous.first_stopped(); stopped >= 0 && stopped != found.rank) {
      found.rank = stopped;
      found.cause += " Rank " + std::to_string(stopped) + " is stopped.";
    }
  }
  const Poison agreed = rendezvous.agree_on(found);
  if (links.mesh != nullptr) links.mesh->tell_controls(encode(poison_frame(agreed)));
  rendezvous.raise(agreed);
}

}  // namespace

std::unique_ptr<Links> connect(std::shared_ptr<Store> store, const Options& options,
                               std::function<bool()> stop, std::function<void()> on_message,
                               std::function<void()> on_failure) {
  const Identity mine = identify(locality_of(options, options.rank));
  Liveness liveness;
  Rendezvous rendezvous(std::move(store), options, mine, liveness, stop);
  auto links = std::make_unique<Links>(options.report);
  try {
    connect_all(links.get(), rendezvous, options, mine, liveness, stop, std::move(on_message),
                std::move(on_failure));
    return links;
  } catch (const PeerFailed& failure) {
    give_up(rendezvous, *links,
            {PoisonKind::kPeerFailed, failure.rank, failure.pid, failure.sequence, failure.host, failure.op,
             failure.cause});
  } catch (const TimedOut& failure) {
    if (stop()) throw;
    give_up(rendezvous, *links, {PoisonKind::kTimedOut, -1, 0, 0, "", "connecting", failure.what()});
  }
}

void publish_failure(Store& store, const Options& options, const std::string& cause) {
  Identity identity = identify(-1);
  identity.failure = cause.empty() ? "failed" : cause;
  const std::string prefix = "mlsys/" + options.group_name + "/";
  const Poison poison{PoisonKind::kPeerFailed,
                      global_rank(options, options.rank),
                      identity.pid,
                      0,
                      identity.host,
                      "connecting",
                      identity.failure};
  const auto failed = encode(poison_frame(poison));
  store.set(prefix + "failed", {failed.begin(), failed.end()});
  store.set(prefix + "identity/" + std::to_string(options.rank), encode(identity));
}

}  // namespace mlsys::comm
