#include "plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "error.h"

namespace fastsd {
namespace {

constexpr std::uint32_t kUnassigned = std::numeric_limits<std::uint32_t>::max();

std::uint64_t distance(const std::byte* from, const std::byte* to) {
  return static_cast<std::uint64_t>(to - from);
}

}  // namespace

void Plan::reserve(std::size_t tensors) {
  tensors_.reserve(tensors);
  views_.reserve(tensors);
  extents_.reserve(tensors);
  dims_.reserve(4 * tensors);
  names_.reserve(32 * tensors);
}

void Plan::add(const View& view, const std::int64_t* dims) {
  const auto refuse = [&](const std::string& why) {
    throw Error(Failure::kUnsupported, "tensor \"" + std::string(view.name) + "\" " + why);
  };
  const DTypeInfo* dtype = find_dtype(static_cast<std::uint16_t>(view.dtype));
  const Strided strided{dtype->item_bytes, view.rank, dims, dims + view.rank};
  if (view.rank > kRankMax) refuse("has more than " + std::to_string(kRankMax) + " dimensions");
  if (view.name.size() > kNameBytesMax)
    refuse("has a name of more than " + std::to_string(kNameBytesMax) + " bytes");
  const auto extent = extent_bytes(strided);
  if (!extent) refuse("has a shape and strides that overflow");
  if (*extent > 0 && view.data == nullptr && !view.has_no_data)
    refuse("has no memory: its storage has been freed, or was never allocated");

  TensorRecord record{};
  record.name_offset = names_.size();
  record.name_bytes = static_cast<std::uint32_t>(view.name.size());
  record.dims_offset = dims_.size();
  record.storage = kUnassigned;
  record.same_as = static_cast<std::uint32_t>(tensors_.size());
  record.dtype = static_cast<std::uint16_t>(view.dtype);
  record.flags = view.flags;
  record.rank = view.rank;
  names_ += view.name;
  dims_.insert(dims_.end(), dims, dims + 2 * std::size_t{view.rank});
  tensors_.push_back(record);
  views_.push_back(view);
  extents_.push_back(*extent);
}

Index Plan::index() const {
  return {{storages_.data(), storages_.size()},
          {tensors_.data(), tensors_.size()},
          {dims_.data(), dims_.size()},
          names_};
}

// The views that have bytes, by address.
std::vector<Plan::Member> Plan::list_members() {
  std::vector<Member> members;
  members.reserve(tensors_.size());
  for (std::uint32_t i = 0; i < tensors_.size(); ++i) {
    if (extents_[i] > 0 && !views_[i].has_no_data)
      members.push_back({views_[i].data, views_[i].data + extents_[i], i});
  }
  const auto by_address = [](const Member& a, const Member& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.tensor < b.tensor;
  };
  if (!std::is_sorted(members.begin(), members.end(), by_address))
    std::sort(members.begin(), members.end(), by_address);
  return members;
}

// Calls visit(first, count) for each run of members that overlap, one alone included.
template <class Visit>
void Plan::for_each_overlap(Visit visit) {
  members_ = list_members();
  for (std::size_t first = 0; first < members_.size();) {
    std::size_t next = first + 1;
    for (const std::byte* end = members_[first].end;
         next < members_.size() && members_[next].begin < end; ++next) {
      end = std::max(end, members_[next].end);
    }
    visit(&members_[first], next - first);
    first = next;
  }
}

void Plan::finish() {
  storages_.reserve(tensors_.size());
  sources_.reserve(tensors_.size());
  for_each_overlap([&](const Member* first, std::size_t count) { add_storage(first, count); });
  add_empty_storages();
  number_by_first_use();
}

void Plan::finish_apart() {
  std::vector<std::uint32_t> all(tensors_.size());
  std::iota(all.begin(), all.end(), 0U);
  add_apart(all);
}

void Plan::finish_apart_by_width() {
  const std::vector<std::uint32_t> firsts = find_equal_views();
  std::vector<std::uint32_t> stored;
  for (std::uint32_t i = 0; i < firsts.size(); ++i) {
    if (firsts[i] == i) stored.push_back(i);
  }
  // By number where widths are the same.
  const auto key = [&](std::uint32_t i) {
    return std::make_pair(-int{find_dtype(tensors_[i].dtype)->item_bytes}, i);
  };
  std::sort(stored.begin(), stored.end(),
            [&](std::uint32_t a, std::uint32_t b) { return key(a) < key(b); });
  add_apart(stored);
  for (std::uint32_t i = 0; i < firsts.size(); ++i)
    tensors_[i].storage = tensors_[firsts[i]].storage;
}

// For each tensor the first whose view is equal: the same memory, dtype, flags and shape, walked in
// the same way.
std::vector<std::uint32_t> Plan::find_equal_views() {
  std::vector<std::uint32_t> firsts(tensors_.size());
  std::iota(firsts.begin(), firsts.end(), 0U);
  for_each_overlap([&](const Member* members, std::size_t count) {
    if (count == 1) return;
    std::map<std::pair<const std::byte*, std::vector<std::int64_t>>, std::uint32_t> views;
    std::vector<std::uint32_t> different;
    for (const Member& member : Span<Member>(members, count)) {
      const Strided view = strided(member.tensor);
      std::vector<std::int64_t> key = {tensors_[member.tensor].dtype, views_[member.tensor].flags};
      for (std::uint32_t d = 0; d < view.rank; ++d) {
        key.push_back(view.shape[d]);
        key.push_back(view.shape[d] == 1 ? 0 : view.stride[d]);
      }
      const auto found = views.emplace(std::make_pair(member.begin, std::move(key)), member.tensor);
      firsts[member.tensor] = found.first->second;
      if (found.second) different.push_back(member.tensor);
    }
    std::sort(different.begin(), different.end());
    if (different.size() > 1) overlaps_.push_back(std::move(different));
  });
  std::sort(overlaps_.begin(), overlaps_.end());
  return firsts;
}

// Gives each of these tensors a storage of its own, in this order.
void Plan::add_apart(const std::vector<std::uint32_t>& tensors) {
  storages_.reserve(tensors.size());
  sources_.reserve(tensors.size());
  for (const std::uint32_t i : tensors) {
    const Strided view = strided(i);
    const std::uint16_t flags = views_[i].has_no_data ? kStorageHasNoData : std::uint16_t{0};
    tensors_[i].storage = static_cast<std::uint32_t>(storages_.size());
    const std::uint64_t bytes = extents_[i] > 0 ? row_major_bytes(view) : 0;
    sources_.push_back({views_[i].data, bytes == 0 || is_contiguous(view), 0, 0, i});
    storages_.push_back({0, bytes, 0, views_[i].device, flags, 0});
  }
}

// Makes one storage of views that overlap.
void Plan::add_storage(const Member* first, std::size_t count) {
  const Span<Member> members(first, count);
  if (count > 1) find_same_objects(members);
  const std::optional<std::uint64_t> lead = count > 1 ? leading_bytes(members) : 0;
  if (!lead) {
    // Overlapping views at odd distances exist only where memory was wrapped by hand, and not even
    // torch can put them into one storage: each gets its own.
    for (const Member& member : members) {
      TensorRecord& tensor = tensors_[member.tensor];
      if (tensor.same_as == member.tensor) add_storage(&member, 1);
      tensor.storage = tensors_[tensor.same_as].storage;
    }
    return;
  }
  const std::byte* end = first->end;
  const std::byte* covered = first->begin;  // every byte before it is reachable
  const std::byte* data = first->begin - *lead;
  for (const Member& member : members) {
    TensorRecord& tensor = tensors_[member.tensor];
    end = std::max(end, member.end);
    if (member.begin <= covered && is_gapless(index().view(tensor)))
      covered = std::max(covered, member.end);
    tensor.storage = static_cast<std::uint32_t>(storages_.size());
    tensor.storage_offset = distance(data, member.begin) / find_dtype(tensor.dtype)->item_bytes;
  }
  sources_.push_back({data, covered == end && *lead == 0,
                      static_cast<std::uint32_t>(first - members_.data()),
                      static_cast<std::uint32_t>(count), first->tensor});
  storages_.push_back({0, distance(data, end), 0, views_[first->tensor].device, 0, 0});
}

void Plan::find_same_objects(const Span<Member>& members) {
  std::unordered_map<const void*, std::uint32_t> originals;
  for (const Member& member : members) {
    tensors_[member.tensor].same_as =
        originals.emplace(views_[member.tensor].identity, member.tensor).first->second;
  }
}

// Zero bytes to put before a storage so that each view starts at a whole item of its dtype, as
// torch demands of tensors that share a storage; nothing if no number of bytes does.
std::optional<std::uint64_t> Plan::leading_bytes(const Span<Member>& members) const {
  constexpr std::uint64_t item_bytes_max = 16;
  const std::byte* base = members[0].begin;
  for (std::uint64_t lead = 0; lead < item_bytes_max; ++lead) {
    const bool fits = std::all_of(members.begin(), members.end(), [&](const Member& member) {
      const std::uint64_t item_bytes = find_dtype(tensors_[member.tensor].dtype)->item_bytes;
      return (distance(base, member.begin) + lead) % item_bytes == 0;
    });
    if (fits) return lead;
  }
  return std::nullopt;
}

// Views without bytes share a storage only if they are the same object.
void Plan::add_empty_storages() {
  std::unordered_map<const void*, std::uint32_t> originals;
  for (std::uint32_t i = 0; i < tensors_.size(); ++i) {
    TensorRecord& tensor = tensors_[i];
    if (tensor.storage != kUnassigned) continue;
    tensor.same_as = originals.emplace(views_[i].identity, i).first->second;
    tensor.storage = tensors_[tensor.same_as].storage;
    if (tensor.same_as != i) continue;
    tensor.storage = static_cast<std::uint32_t>(storages_.size());
    const std::uint64_t bytes = extents_[i];
    const std::uint16_t flags = views_[i].has_no_data ? kStorageHasNoData : std::uint16_t{0};
    storages_.push_back({0, bytes, 0, views_[i].device, flags, 0});
    sources_.emplace_back();
  }
}

// Storages were found by address; in the file they lie in the order in which the tensors use them,
// so that reading a dictionary in its order reads the file in its order.
void Plan::number_by_first_use() {
  const auto by_storage = [](const TensorRecord& a, const TensorRecord& b) {
    return a.storage < b.storage;
  };
  if (std::is_sorted(tensors_.begin(), tensors_.end(), by_storage)) return;
  std::vector<std::uint32_t> number(storages_.size(), kUnassigned);
  std::vector<StorageRecord> storages;
  std::vector<Source> sources;
  storages.reserve(storages_.size());
  sources.reserve(sources_.size());
  for (TensorRecord& tensor : tensors_) {
    std::uint32_t& own = number[tensor.storage];
    if (own == kUnassigned) {
      own = static_cast<std::uint32_t>(storages.size());
      storages.push_back(storages_[tensor.storage]);
      sources.push_back(sources_[tensor.storage]);
    }
    tensor.storage = own;
  }
  storages_ = std::move(storages);
  sources_ = std::move(sources);
}

const std::byte* Plan::bytes_in_place(std::size_t storage, std::uint64_t begin) const {
  const Source& source = sources_[storage];
  return source.is_gapless ? source.data + begin : nullptr;
}

void Plan::fill(std::size_t storage, std::uint64_t begin, std::uint64_t end, std::byte* target,
                const std::byte* copy) const {
  const Source& from = sources_[storage];
  // Byte 0 of the storage, or where it would be before what was copied.
  const std::byte* data =
      copy == nullptr ? from.data : copy - (source(storage, begin, end).begin() - from.data);
  if (from.is_gapless) {
    std::memcpy(target, data + begin, end - begin);
    return;
  }
  if (from.member_count == 0) {
    copy_row_major(strided(from.tensor), data, begin, end, target);
    return;
  }
  std::memset(target, 0, end - begin);
  for (std::uint32_t i = 0; i < from.member_count; ++i) {
    const Member& member = members_[from.first_member + i];
    const std::uint64_t member_begin = distance(from.data, member.begin);
    const std::uint64_t member_end = distance(from.data, member.end);
    const std::uint64_t first = std::max(begin, member_begin);
    const std::uint64_t last = std::min(end, member_end);
    if (first >= last) continue;
    copy_reachable(strided(member.tensor), data + member_begin, first - member_begin,
                   last - member_begin, target + (first - begin));
  }
}

Span<std::byte> Plan::source(std::size_t storage, std::uint64_t begin, std::uint64_t end) const {
  const Source& source = sources_[storage];
  if (source.is_gapless) return {source.data + begin, end - begin};
  if (source.member_count == 0) return {source.data, extents_[source.tensor]};
  // The bytes that were put before the first view are nobody's.
  const std::uint64_t lead = distance(source.data, members_[source.first_member].begin);
  const std::uint64_t first = std::min(std::max(begin, lead), end);
  return {source.data + first, end - first};
}

}  // namespace fastsd
