#include "bindings/comm/mpi_job.h"

#include <dlfcn.h>

#include <algorithm>

#include "bindings/comm/failures.h"
#include "bindings/comm/mpi_carrier.h"

namespace mlsys::binding {
namespace {

// The extension is loaded already; its symbols and those of the libraries it is linked with are searched.
// They are not in the global scope, into which mpi4py loads nothing.
class LoadedLibrary {
 public:
  explicit LoadedLibrary(const std::string& path)
      : path_(path), handle_(::dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {}
  LoadedLibrary(const LoadedLibrary&) = delete;
  LoadedLibrary& operator=(const LoadedLibrary&) = delete;
  ~LoadedLibrary() {
    if (handle_ != nullptr) (void)::dlclose(handle_);
  }

  template <class Function>
  void find(const char* name, Function& function) const {
    function = reinterpret_cast<Function>(::dlsym(handle_ == nullptr ? RTLD_DEFAULT : handle_, name));
    if (function != nullptr) return;
    throw Refused("MLSYS_TRANSPORT=mpi, but " + path_ + " is linked with no library that has " + name + ".",
                  "The engine calls the MPI that mpi4py has loaded.",
                  "Install an mpi4py of this MPI, or unset MLSYS_TRANSPORT for TCP.");
  }

 private:
  std::string path_;
  void* handle_;
};

}  // namespace

template <class Handle>
MpiFunctions<Handle> find_mpi_functions(const std::string& extension) {
  const LoadedLibrary library(extension);
  MpiFunctions<Handle> mpi{};
  library.find("MPI_Isend", mpi.isend);
  library.find("MPI_Irecv", mpi.irecv);
  library.find("MPI_Test", mpi.test);
  library.find("MPI_Cancel", mpi.cancel);
  library.find("MPI_Finalized", mpi.finalized);
  library.find("MPI_Error_string", mpi.error_string);
  return mpi;
}

template MpiFunctions<int> find_mpi_functions<int>(const std::string&);
template MpiFunctions<void*> find_mpi_functions<void*>(const std::string&);

std::shared_ptr<comm::Carrier> make_mpi_carrier(const MpiJob& job, comm::CarrierUse use, int num_lanes) {
  const bool collectives = use == comm::CarrierUse::kCollectives;
  const int tag = job.first_tag + (collectives ? 0 : MpiJob::kMostLanes);
  num_lanes = collectives ? std::min(num_lanes, MpiJob::kMostLanes) : 1;
  if (job.handle_bytes == sizeof(int)) return std::make_shared<MpiCarrier<int>>(job, tag, num_lanes);
  if (job.handle_bytes == sizeof(void*)) return std::make_shared<MpiCarrier<void*>>(job, tag, num_lanes);
  throw Refused("The handles of this MPI have " + std::to_string(job.handle_bytes) + " bytes.",
                "They are ints (MPICH and its relatives) or pointers (Open MPI, the standard ABI).",
                "Unset MLSYS_TRANSPORT for TCP.");
}

}  // namespace mlsys::binding
