# What the scripts of this folder share: a server of nbdsnap in the machine, its
# exports as block devices, and the instant of a snapshot. They run under `set -e`.

modprobe nbd max_part=8
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n' >/etc/hosts
: >/tmp/server.log

# The shell prefers busybox's own programs, which know too few options.
blkdiscard() { /sbin/blkdiscard "$@"; }
fstrim() { /sbin/fstrim "$@"; }

# End with a reason, and with what the server and the kernel said.
die() {
    echo "FAILED: $*"
    tail -20 /tmp/server.log
    dmesg | tail -20
    exit 1
}

# patiently WHAT COMMAND...: wait until the command succeeds; WHAT is missing if it
# never does.
patiently() {
    local what=$1 n=0
    shift
    until "$@"; do
        n=$((n + 1))
        [ $n -lt 1200 ] || die "$what does not come"
        usleep 50000
    done
}

# serve ARGUMENT...: begin to serve, and wait until the exports are ready.
serve() {
    : >/tmp/exports
    nbdsnap serve "$@" >/tmp/exports 2>>/tmp/server.log &
    server=$!
    patiently "a server ($*)" is_ready
}
is_ready() {
    kill -0 $server 2>/dev/null || die "the server ended at once"
    grep -q ^nbd: /tmp/exports
}

# End the server as its users do: it must say that all is well.
stop_server() {
    kill -TERM $server
    wait $server || die "the server ended with $?"
}

# attach EXPORT DEVICE [OPTION]...: as a block device, with options of nbd-client.
attach() {
    local export=$1 device=$2
    shift 2
    nbd-client -N $export "$@" localhost $device >/tmp/nbd-client.log 2>&1 ||
        die "nbd-client $export $device: $(cat /tmp/nbd-client.log)"
}

# detach DEVICE...: until nothing is attached there.
detach() {
    local device
    for device in "$@"; do
        nbd-client -d $device
        patiently "the end of $device" is_free $device
    done
}
is_free() { ! nbd-client -c $1 >/dev/null; }

# The live disk is mounted from /dev/mapper/live. Beneath it lies /dev/nbd0 or
# /dev/nbd1, so that one can take the place of the other.
open_live() {
    beneath=/dev/nbd0
    attach disk $beneath
    dmsetup create live --table "0 $(sectors $beneath) linear $beneath 0"
}
close_live() {
    dmsetup remove live
    detach $beneath
}

# serve_disk: the disk with all its snapshots.
snapshots=
serve_disk() { serve disk=$DISK $snapshots --control /run/nbdsnap.control; }

# exchange_server [OPTION]: the server ends, and another one serves the disk with
# all its snapshots, under a file system that stays mounted: device-mapper holds
# what is written meanwhile. The file system is frozen for that, or with --nolockfs
# it notices nothing, and its journal is as a power cut would leave it. No other
# export may be attached.
exchange_server() {
    local before=$beneath
    dmsetup suspend "$@" live
    nbd-client -d $before
    stop_server
    serve_disk
    case $before in
    /dev/nbd0) beneath=/dev/nbd1 ;;
    *) beneath=/dev/nbd0 ;;
    esac
    attach disk $beneath
    dmsetup load live --table "0 $(sectors $beneath) linear $beneath 0"
    dmsetup resume live
    patiently "the end of $before" is_free $before
}

# take_snapshot NAME [frozen]: one more snapshot of the live disk, now, in a new
# store under $STORES, by an order to the server that serves it. The file system is
# mounted on /mnt/live and written; it is frozen for the instant, or notices nothing,
# and its journal is as a power cut would leave it.
take_snapshot() {
    local name=$1 frozen=${2-}
    set -- --cow $STORES/$name --control /run/nbdsnap.control
    [ -z "$frozen" ] || set -- "$@" --freeze "fsfreeze --freeze /mnt/live" --thaw "fsfreeze --unfreeze /mnt/live"
    nbdsnap snapshot create disk@$name "$@" >/tmp/order.log 2>&1 || die "$name: $(cat /tmp/order.log)"
    snapshots="$snapshots --snapshot disk@$name=$STORES/$name"
}
