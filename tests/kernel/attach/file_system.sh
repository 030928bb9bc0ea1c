# A file system on the live disk, $FS, mounted and written all the time, and two
# snapshots of it: `monday` with a journal to be replayed, `tuesday` frozen. What
# each must hold are the checksums of its files at its instant. Then the server is
# started anew, the disk is detached while it is written, and at last the origin is
# written behind the server's back, which must be seen.

DISK=/dev/vda STORES=/mnt/stores
modprobe $FS
modprobe ext4
mkdir -p /mnt/live /mnt/snapshot $STORES
mkfs.ext4 -q -F -E lazy_itable_init=0 /dev/vdb
mount /dev/vdb $STORES

case $FS in
ext4)
    make() { mkfs.ext4 -q -F -E lazy_itable_init=0 $1; }
    examine() { e2fsck -fn $1 >/tmp/examined 2>&1 || die "e2fsck $1: $(cat /tmp/examined)"; }
    unreplayed=ro,noload frozen=ro writable=rw
    replayed="recovery complete"
    ;;
xfs)
    make() { mkfs.xfs -q -f $1; }
    examine() { xfs_repair -n $1 >/tmp/examined 2>&1 || die "xfs_repair $1: $(cat /tmp/examined)"; }
    # What lies in the log alone cannot be seen before it is replayed, and even a
    # frozen file system wants that.
    unreplayed= frozen=ro,norecovery,nouuid writable=rw,nouuid
    replayed="Ending recovery"
    ;;
esac

# fill FOLDER: files of many lengths, written in every way.
fill() {
    mkdir -p $1/deep/er
    for n in $(seq 1 20); do head -c $((n * n * 97)) /dev/urandom >$1/file$n; done
    : >$1/empty
    head -c 600000 /dev/urandom >$1/still
    head -c 700000 /dev/urandom >$1/deep/large
    dd if=/dev/urandom of=$1/deep/fsynced bs=50001 count=3 conv=fsync 2>/dev/null
    dd if=/dev/urandom of=$1/deep/er/direct bs=4k count=40 oflag=direct 2>/dev/null
}

# change FOLDER WORD: overwrite, cut, remove, rename and add; `still` stays.
change() {
    for n in $(seq 1 9); do head -c 20000 /dev/urandom >$1/file$n; done
    dd if=/dev/urandom of=$1/deep/large bs=64k count=8 conv=notrunc,fsync 2>/dev/null
    dd if=/dev/urandom of=$1/deep/er/direct bs=4k count=20 conv=notrunc oflag=direct 2>/dev/null
    rm -f $1/file10 $1/file11 $1/$2
    mv $1/file12 $1/$2
    head -c 9000 /dev/urandom >$1/file12
    mkdir -p $1/$2.more && head -c 123456 /dev/urandom >$1/$2.more/added
}

# checksums FOLDER: of every file, by name.
checksums() { (cd $1/settled && find . -type f | sort | xargs sha256sum); }

# holds FOLDER NAME: the files of that instant, no more and no fewer.
holds() {
    checksums $1 >/tmp/shown
    [ $(wc -l </tmp/shown) -ge 25 ] || return 1
    cmp -s /tmp/shown /tmp/$2.sums
}

# write_on FOLDER: number after number into one file, each durable before it is
# acknowledged, and other files for the disk to be busy; until it is told to stop
# or the disk is gone.
write_on() {
    n=$(acknowledged)
    while ! [ -e /tmp/stop ]; do
        n=$((n + 1))
        echo $n >>$1/log && sync $1/log || break
        echo $n >>/tmp/acknowledged
        head -c 30000 /dev/urandom >$1/file$((n % 5)) || break
    done 2>/dev/null
}
acknowledged() { wc -l </tmp/acknowledged; }
has_written() { [ $(acknowledged) -ge $1 ]; }
begin_writing() {
    rm -f /tmp/stop
    write_on /mnt/live/busy &
    writer=$!
}
stop_writing() {
    touch /tmp/stop
    wait $writer
}
write_more() { patiently "more numbers" has_written $(($(acknowledged) + 4)); }

# counts FOLDER FROM TO: the numbers are there in order, as many as that.
counts() {
    local count=$(wc -l <$1/busy/log)
    seq 1 $count | cmp -s - $1/busy/log || die "$1: the numbers: $(cat $1/busy/log | tr '\n' ' ')"
    [ $count -ge $2 ] && [ $count -le $3 ] || die "$1: $count numbers, but there must be $2 to $3"
}

# look DEVICE OPTIONS NAME: mounted so, the device holds the instant.
look() {
    mount -t $FS -o $2 $1 /mnt/snapshot || die "$1 cannot be mounted ($2)"
    holds /mnt/snapshot $3 || die "$1 ($2) does not hold $3"
    umount /mnt/snapshot
}

# --- the disk, and the first instant: in the middle of everything
: >/tmp/acknowledged
serve_disk
open_live
make /dev/mapper/live
mount -t $FS /dev/mapper/live /mnt/live
mkdir /mnt/live/settled /mnt/live/busy
fill /mnt/live/settled
sync
checksums /mnt/live >/tmp/monday.sums
begin_writing
write_more
from=$(acknowledged)
take_snapshot monday
to=$(($(acknowledged) + 1))
change /mnt/live/settled week

attach disk@monday /dev/nbd2
write_more
[ -z "$unreplayed" ] || look /dev/nbd2 $unreplayed monday
dmesg | grep -q "nbd2).*$replayed" && die "the journal was replayed too early"
mount -t $FS -o $writable /dev/nbd2 /mnt/snapshot
dmesg | grep -q "nbd2).*$replayed" || die "there was no journal to replay"
holds /mnt/snapshot monday || die "monday, replayed"
counts /mnt/snapshot $from $to
write_more
change /mnt/snapshot/settled fork
checksums /mnt/snapshot >/tmp/fork.sums
umount /mnt/snapshot
examine /dev/nbd2
look /dev/nbd2 $frozen fork
say monday $from $(acknowledged)

# --- the second instant, with the file system frozen
sync
checksums /mnt/live >/tmp/tuesday.sums
write_more
from=$(acknowledged)
take_snapshot tuesday frozen
to=$(($(acknowledged) + 1))
change /mnt/live/settled end
checksums /mnt/live >/tmp/live.sums
attach disk@tuesday /dev/nbd3 -R
write_more
look /dev/nbd3 $frozen tuesday
look /dev/nbd2 $frozen fork
detach /dev/nbd3
attach disk@tuesday /dev/nbd3
mount -t $FS -o $writable /dev/nbd3 /mnt/snapshot
holds /mnt/snapshot tuesday || die "tuesday, writable"
counts /mnt/snapshot $from $to
umount /mnt/snapshot
stop_writing
holds /mnt/live live || die "the live disk"
say tuesday $from $(acknowledged)

# --- discards: the snapshots need nothing for them
sync
fstrim /mnt/live
look /dev/nbd2 $frozen fork
look /dev/nbd3 $frozen tuesday

# --- the server is exchanged under the mounted file system
detach /dev/nbd2 /dev/nbd3
exchange_server --nolockfs
holds /mnt/live live || die "the live disk after the server was exchanged"

# --- the server ends and begins between two mounts
umount /mnt/live
close_live
stop_server
serve_disk
attach disk /dev/nbd0
attach disk@monday /dev/nbd2
attach disk@tuesday /dev/nbd3
mount -t $FS /dev/nbd0 /mnt/live
holds /mnt/live live || die "the live disk after a restart"
counts /mnt/live $(acknowledged) $(acknowledged)
look /dev/nbd2 $frozen fork
look /dev/nbd3 $frozen tuesday

# --- the disk is detached while it is written; the server and the snapshots stay
begin_writing
write_more
nbd-client -d /dev/nbd0
wait $writer
[ -e /tmp/stop ] && die "nobody noticed that the disk was gone"
look /dev/nbd3 $frozen tuesday
umount /mnt/live
patiently "the end of /dev/nbd0" is_free /dev/nbd0
attach disk /dev/nbd0
mount -t $FS /dev/nbd0 /mnt/live
holds /mnt/live live || die "the live disk after it was detached"
counts /mnt/live $(acknowledged) $(($(acknowledged) + 1))
umount /mnt/live
examine /dev/nbd0
look /dev/nbd2 $frozen fork
look /dev/nbd3 $frozen tuesday
examine /dev/nbd3
say detached $(acknowledged)

# --- and that all this looks: a write that nbdsnap does not see
detach /dev/nbd0 /dev/nbd2 /dev/nbd3
stop_server
mount -t $FS $DISK /mnt/live
dd if=/dev/urandom of=/mnt/live/settled/still bs=600000 count=1 conv=notrunc,fsync 2>/dev/null
umount /mnt/live
serve_disk
attach disk@tuesday /dev/nbd3
mount -t $FS -o $frozen /dev/nbd3 /mnt/snapshot
holds /mnt/snapshot tuesday && die "a snapshot that is wrong is taken for exact"
grep -v ./still /tmp/shown >/tmp/others
grep -v ./still /tmp/tuesday.sums | cmp -s - /tmp/others || die "more than one file is wrong"
umount /mnt/snapshot
detach /dev/nbd3
stop_server
umount $STORES
say seen
