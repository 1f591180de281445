#!/bin/bash
# run-in-vm.sh [-t SECONDS] [-r] [-n] [-a FILE]... -- PROGRAM [ARGUMENT]...
#
# Runs a program in a virtual machine that lives for just that: Debian's kernel, which has network
# emulation, under qemu's software emulation, so that nothing of the host's kernel is needed. The
# program comes along with the other files that its arguments name (by absolute paths), and with ip
# and tc; all else is busybox. Programs come without what is only for debuggers. The variables
# THALWEG_* and UCX_* come along. -a brings another file. -n only sees to it that all is there to
# make the machine of. With -r it has RDMA devices that the kernel makes of network interfaces
# (soft-RoCE), and libibverbs: rxe0 (10.77.0.1); rxa (10.78.0.1) and rxb (10.78.0.2), whose packets
# cross a wire, from va to vb; and in the same way rxc (10.79.0.1) and rxd (10.79.0.2), from vc to vd.
# The program's output comes to standard output as it is said, and its status is this script's. Where
# the machine's clock and the host's went apart meanwhile by 5 s or more, the output's last line says
# so: timeouts and retries of adapters came early then.
#
#   77    the machine cannot be made here; the last line on standard error says why
#   124   the time is up
#   125   the machine died
#
# The kernel is Debian's package, fetched once (not installed) into $THALWEG_TEST_VM_CACHE, by
# default ~/.cache/thalweg-vm. So is qemu, unless it is installed: its package cannot be where newer
# ones of qemu's that are there already would have to go.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

cannot() { echo "$*" >&2; exit 77; }

limit=180 rdma='' only='' files=()
while getopts t:rna: option; do
  case $option in
    t) limit=$OPTARG ;;
    r) rdma=1 ;;
    n) only=1 ;;
    a) files+=("$OPTARG") ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ "${1-}" != -- ] || shift
[ $# -gt 0 ] || [ -n "$only" ] || { echo "which program?" >&2; exit 2; }

for tool in busybox cpio modprobe depmod xz zstd ip tc ${rdma:+rdma}; do
  command -v "$tool" >/dev/null || cannot "there is no $tool"
done
libraries=/usr/lib/x86_64-linux-gnu
if [ -n "$rdma" ]; then
  [ -e $libraries/libibverbs.so.1 ] || cannot "there is no libibverbs (Debian: libibverbs1)"
  ls $libraries/libibverbs/librxe-*.so >/dev/null 2>&1 ||
    cannot "libibverbs has no driver for soft-RoCE (Debian: ibverbs-providers)"
fi
[ "$(uname -m)" = x86_64 ] || cannot "the programs of $(uname -m) do not run in it"

cache=${THALWEG_TEST_VM_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/thalweg-vm}
cache=$cache/2 # what is kept there has changed since
mkdir -p "$cache" || cannot "cannot make $cache"
work=$(mktemp -d "${TMPDIR:-/tmp}/thalweg-vm.XXXXXX")
trap 'rm -rf "$work"' EXIT

# number FILE OFFSET LENGTH: a little-endian number
number() { od -An -v -t"u$3" -j"$2" -N"$3" "$1" | tr -d ' '; }

# The kernel proper, out of the self-extracting file FROM: emulated, its own extraction takes long.
# The boot protocol says where it lies: at 0x1f1 the sectors of set-up, at 0x248 the offset of the
# compressed kernel behind them, at 0x24c its length, of which the last four bytes are its size.
extract_kernel() { # FROM TO
  local at length
  at=$((($(number "$1" $((0x1f1)) 1) + 1) * 512 + $(number "$1" $((0x248)) 4)))
  length=$(($(number "$1" $((0x24c)) 4) - 4))
  tail -c +$((at + 1)) "$1" | head -c "$length" >"$work/compressed"
  case $(od -An -tx1 -N4 "$work/compressed" | tr -d ' ') in
    fd377a58) xz -dc --single-stream <"$work/compressed" ;;
    28b52ffd) zstd -dcq <"$work/compressed" ;;
    1f8b*) gzip -dc <"$work/compressed" ;;
    *) return 1 ;;
  esac >"$2"
}

# Tries it, and once more with new lists of packages.
fetch() {
  command -v apt-get >/dev/null || cannot "there is no apt-get to fetch packages with"
  "$@" || { apt-get -qq update >&2 || :; "$@"; }
}

fetch_kernel() {
  local package
  package=$(apt-cache depends linux-image-amd64 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
  [ -n "$package" ] || return 1
  (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package") >&2
}

# Of what it needs, what is not installed as well. Nothing is changed by this, so no lock is needed.
fetch_qemu() {
  mkdir -p "$work/qemu-packages/partial"
  apt-get -qq -y --download-only --no-install-recommends -o Debug::NoLocking=1 \
    -o APT::Sandbox::User=root -o Dir::Cache::archives="$work/qemu-packages" \
    install qemu-system-x86 >&2
}

# Unpacks qemu into the cache.
prepare_qemu() {
  local package
  fetch fetch_qemu || cannot "the package of qemu cannot be fetched"
  rm -rf "$cache/qemu"
  mkdir -p "$work/qemu"
  for package in "$work"/qemu-packages/*.deb; do
    dpkg-deb -x "$package" "$work/qemu"
  done
  mv "$work/qemu" "$cache/qemu"
}

# Fills the cache: `kernel`, and `modules`, a folder with those that are needed and their order.
prepare() {
  fetch fetch_kernel || cannot "the package of a kernel cannot be fetched"
  local root=$work/package release module file
  mkdir -p "$root"
  dpkg-deb --fsys-tarfile "$work"/linux-image-*.deb |
    tar -x -C "$root" --wildcards './boot/vmlinuz-*' './lib/modules/*/kernel/net' \
      './lib/modules/*/kernel/drivers/net/veth*' './lib/modules/*/kernel/lib' \
      './lib/modules/*/kernel/drivers/net/dummy*' './lib/modules/*/kernel/drivers/infiniband' \
      './lib/modules/*/kernel/crypto' './lib/modules/*/kernel/arch' \
      './lib/modules/*/modules.*' || cannot "the package of the kernel is not as it was"
  release=$(ls "$root/lib/modules")
  depmod -b "$root" "$release"
  mkdir -p "$work/modules"
  for module in veth sch_netem dummy crc32_generic rdma_rxe ib_uverbs; do
    modprobe -d "$root" -S "$release" --show-depends "$module"
  done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
    case $file in
      *.xz) file_name=$(basename "$file" .xz) && xz -dc "$file" >"$work/modules/$file_name" ;;
      *) file_name=$(basename "$file") && cp "$file" "$work/modules/" ;;
    esac
    echo "$file_name" >>"$work/modules/order"
  done
  grep -q netem "$work/modules/order" || cannot "kernel $release has no network emulation"
  grep -q rdma_rxe "$work/modules/order" || cannot "kernel $release has no soft-RoCE"
  extract_kernel "$root/boot/vmlinuz-$release" "$work/kernel" || cannot "cannot extract the kernel"
  rm -rf "$cache/modules"
  mv "$work/modules" "$cache/modules"
  mv "$work/kernel" "$cache/kernel" # last: it is what is looked for
  rm -rf "$root"
}

exec 9>"$cache/lock"
flock 9
qemu=(qemu-system-x86_64)
starts() { "${qemu[@]}" --version >"$work/version" 2>&1; }
if ! command -v "${qemu[0]}" >/dev/null; then
  here=$cache/qemu
  paths=$here$libraries:$here${libraries#/usr} # packages of before the two became one
  qemu=(env LD_LIBRARY_PATH="$paths" "$here/usr/bin/qemu-system-x86_64"
    -L "$here/usr/share/qemu" -L "$here/usr/share/seabios")
  starts || prepare_qemu
fi
starts || cannot "qemu does not start: $(head -1 "$work/version")"
[ -s "$cache/kernel" ] || prepare
exec 9>&-
[ -z "$only" ] || exit 0

# The file system of the machine: busybox, ip and tc, the program, what they are linked with.
root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,run/netns,var,etc,modules}
ln -s ../run "$root/var/run"
cp "$(command -v busybox)" "$root/bin/busybox"
cp "$cache"/modules/* "$root/modules/"

# Puts files where they are on the host, with their libraries.
bring() {
  local file library
  for file in "$@"; do
    install -D -m 755 "$file" "$root$(realpath -s "$file")"
    strip --strip-debug "$root$(realpath -s "$file")" 2>/dev/null || :
    # Scripts are linked with nothing.
    for library in $(ldd "$file" 2>/dev/null | grep -o '/[^ ]*' || :); do
      [ -e "$root$library" ] || install -D -m 755 "$library" "$root$library"
    done
  done
}
bring "$(command -v ip)" "$(command -v tc)"
for word in "$@"; do
  [ ! -f "$word" ] || bring "$word"
done
# By path: the shell would take busybox's own.
echo "export IP=$(command -v ip) TC=$(command -v tc) RDMA=$(command -v rdma)" >"$root/tools"
for file in ${files[@]+"${files[@]}"}; do
  bring "$file"
done
if [ -n "$rdma" ]; then
  bring "$(command -v rdma)" $libraries/libibverbs.so.1 $libraries/libibverbs/librxe-*.so
  mkdir -p "$root/etc/libibverbs.d"
  echo "driver rxe" >"$root/etc/libibverbs.d/rxe.driver"
  cp "$(dirname "$0")/rdma-devices.sh" "$root/rdma-devices"
fi
{
  declare -px | sed -n 's/^declare -x \(THALWEG_\|UCX_\)/export \1/p'
  echo "export PATH=/usr/sbin:/usr/bin:/sbin:/bin"
  echo ". /tools"
  echo "export THALWEG_TEST_VM=1 ${rdma:+THALWEG_TEST_RDMA=1}"
  printf 'exec'
  printf ' %q' "$@"
  echo
} >"$root/program"

cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ulimit -n 65536
while read -r module; do insmod "/modules/$module"; done </modules/order
ip link set lo up
if [ -e /rdma-devices ] && ! sh -e /rdma-devices >/dev/ttyS0 2>&1; then
  echo "the RDMA devices cannot be made"
  poweroff -f
fi
ulimit -l unlimited
stty -F /dev/ttyS1 raw
# The emulated processor's clock, less the emulated clock chip's, which is the host's.
ahead() {
  read -r up _ </proc/uptime
  echo $((${up%.*} - $(cat /sys/class/rtc/rtc0/since_epoch)))
}
before=$(ahead)
# Through a pipe, so that no program believes that it talks to a person.
{ sh /program 2>&1 </dev/null; echo $? >/status; } | cat >/dev/ttyS1
ahead=$(($(ahead) - before))
[ ${ahead#-} -lt 5 ] || echo "the machine's clock went $ahead s ahead of the host's" >/dev/ttyS1
cat /status >/dev/ttyS2
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet) >"$work/initrd"

# Copying by `rep movsb` is emulated byte by byte, so the machine is not told that it would be fast: the
# conformance tests take 73 s instead of 91.
state=0
timeout --foreground -k 5 "$limit" "${qemu[@]}" -M q35 -accel tcg,thread=multi -cpu max,-erms,-fsrm -smp 2 -m 2048 \
  -nodefaults -display none -no-reboot -kernel "$cache/kernel" -initrd "$work/initrd" \
  -append "console=ttyS0 panic=-1 mitigations=off loglevel=4 tsc=reliable clocksource=tsc" \
  -serial "file:$work/log" -chardev stdio,id=output,signal=off -serial chardev:output \
  -serial "file:$work/status" </dev/null | cat || state=${PIPESTATUS[0]}
status=$(tr -cd '0-9' <"$work/status")
[ -z "$status" ] || exit "$status"
[ "$state" != 124 ] || { echo "no end within $limit s" >&2; exit 124; }
tail -15 "$work/log" >&2
echo "the machine died (qemu: $state)" >&2
exit 125
