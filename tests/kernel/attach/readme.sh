# The commands of the README, as they are printed there: /test/readme has them.

modprobe ext4
mkdir /tmp/readme /tmp/live
cd /tmp/readme
truncate -s 16M disk.img
mkfs.ext4 -q -F -E lazy_itable_init=0 disk.img
mount -o loop disk.img /mnt
echo "on monday" >/mnt/note
umount /mnt
serve disk.img --snapshot disk@monday=monday.cow --listen 127.0.0.1:10809 --listen unix:/run/nbdsnap.sock
(set -ex && . /test/readme) >/tmp/readme.log 2>&1 || die "the README: $(cat /tmp/readme.log)"
[ "$(cat /mnt/note)" = "on monday" ] || die "the README: nothing is mounted"
attached=$(for pid in /sys/block/nbd*/pid; do echo $pid | cut -d/ -f4; done | tr '\n' ' ')
say readme $attached
umount /mnt

# The disk is the same through each of its attachments.
mount /dev/nbd0 /tmp/live
echo "on tuesday" >/tmp/live/note
umount /tmp/live
mount -o ro /dev/nbd2 /tmp/live || die "the README: the Unix socket"
[ "$(cat /tmp/live/note)" = "on tuesday" ] || die "the README: the Unix socket shows another disk"
umount /tmp/live
mount /dev/nbd1 /mnt
[ "$(cat /mnt/note)" = "on monday" ] || die "the README: the snapshot has changed"
umount /mnt
detach /dev/nbd0 /dev/nbd1 /dev/nbd2
stop_server
cd /
