# A disk with partitions: made, filled and then made otherwise through the server.
# The snapshot of the empty disk has none; the one of the filled disk goes on having
# the first ones, with their files.

DISK=/dev/vda STORES=/tmp/stores
mkdir -p $STORES /mnt/p1 /mnt/p2
modprobe ext4
checksums() { (cd $1 && find . -type f | sort | xargs sha256sum); }
table() { sfdisk -d $1 | grep -v -e ^device -e ^label-id | sed "s,$1,disk,"; }

serve_disk_with() { snapshots="$snapshots --snapshot disk@$1=$STORES/$1" && serve_disk; }

serve_disk_with empty
attach disk /dev/nbd0
sfdisk -q /dev/nbd0 <<'TABLE'
label: gpt
start=2048, size=32768
start=40960, size=40960
TABLE
patiently "the partitions" test -b /dev/nbd0p2
for n in 1 2; do
    mkfs.ext4 -q -F -E lazy_itable_init=0 /dev/nbd0p$n
    mount /dev/nbd0p$n /mnt/p$n
    for i in $(seq 1 8); do head -c $((n * i * 11111)) /dev/urandom >/mnt/p$n/file$i; done
    checksums /mnt/p$n >/tmp/p$n.sums
    umount /mnt/p$n
done
table /dev/nbd0 >/tmp/filled.table
detach /dev/nbd0
stop_server

# From here on the disk changes under the snapshot: files, then the table.
serve_disk_with filled
attach disk /dev/nbd0
attach disk@empty /dev/nbd1
attach disk@filled /dev/nbd2
mount /dev/nbd0p1 /mnt/p1
rm /mnt/p1/file[1-4]
head -c 300000 /dev/urandom >/mnt/p1/file5
umount /mnt/p1
sfdisk -q --wipe always /dev/nbd0 <<'TABLE'
label: dos
start=10240, size=81920, type=83
TABLE
patiently "the new partition" test ! -b /dev/nbd0p2
mkfs.ext4 -q -F -E lazy_itable_init=0 /dev/nbd0p1

table /dev/nbd2 | cmp -s - /tmp/filled.table || die "the snapshot's table: $(table /dev/nbd2)"
table /dev/nbd0 | cmp -s - /tmp/filled.table && die "the disk's table should be another one"
sfdisk -d /dev/nbd1 2>/dev/null | grep -q start= && die "the empty disk has partitions"
blockdev --rereadpt /dev/nbd2
patiently "the snapshot's partitions" test -b /dev/nbd2p2
for n in 1 2; do
    mount -o ro /dev/nbd2p$n /mnt/p$n
    checksums /mnt/p$n | cmp -s - /tmp/p$n.sums || die "partition $n of the snapshot"
    umount /mnt/p$n
    mount /dev/nbd2p$n /mnt/p$n
    head -c 100000 /dev/urandom >/mnt/p$n/new
    umount /mnt/p$n
    e2fsck -fn /dev/nbd2p$n >/dev/null 2>&1 || die "partition $n of the snapshot is damaged"
done
[ ! -b /dev/nbd1p1 ] || die "the empty disk has a partition"
say partitions $(wc -l </tmp/p1.sums) and $(wc -l </tmp/p2.sums) files
detach /dev/nbd0 /dev/nbd1 /dev/nbd2
stop_server
