# The walkthroughs, first with the kernel's dmsetup, then with nbdsnap in its place:
# the same scripts, with the program's name changed and nothing else. The first device
# stays mounted and is written all the while.

modprobe ext4; modprobe xfs
mkdir -p /mnt/disk /mnt/snapshot
cat >/tmp/after <<'END_OF_AFTER'
#!/bin/sh
# Right after the instant: overwrite, remove and add files, and see it on the disk.
cd /mnt/disk/settled
for n in $(seq 1 20); do head -c 40000 /dev/urandom >file$n; done
rm file2?
for n in $(seq 1 10); do head -c 30000 /dev/urandom >new$n; done
sync
END_OF_AFTER
cat >/tmp/backup <<'END_OF_BACKUP'
#!/bin/sh
# The files of the instant, and how far the writer had come.
(cd $1/settled && find . -type f | sort | xargs sha256sum) >/tmp/backup.sums
cp $1/log /tmp/backup.log
END_OF_BACKUP
chmod +x /tmp/after /tmp/backup
export AFTER=/tmp/after DMSETUP=/test/dmsetup_traced

# Files that are all there, some of them not on the disk yet, and a writer that never
# stops: number after number, each durable before it is acknowledged.
begin() {
    mkdir /mnt/disk/settled
    for n in $(seq 1 40); do head -c $((n * 3000)) /dev/urandom >/mnt/disk/settled/file$n; done
    (cd /mnt/disk/settled && find . -type f | sort | xargs sha256sum) >/tmp/before.sums
    rm -f /tmp/stop
    : >/tmp/acknowledged
    write_on &
    writer=$!
    wait_until has_written 2
}
write_on() {
    n=0
    until [ -e /tmp/stop ]; do
        n=$((n + 1))
        echo $n >>/mnt/disk/log && sync /mnt/disk/log || exit 1
        echo $n >>/tmp/acknowledged
        usleep 20000 # for the others under emulation
    done
}
has_written() { [ $(wc -l </tmp/acknowledged) -ge $1 ]; }

# end NAME TABLE OPTION: the backup is the instant, the disk is as it was meant to be,
# and all of it is there on the disk, which is mounted with an option.
end() {
    touch /tmp/stop
    wait $writer || die $1: the writer failed
    cmp /tmp/before.sums /tmp/backup.sums || die $1: the backup is not the instant
    [ $(wc -l </tmp/before.sums) -gt 30 ] || die $1: no files
    seq 1 $(wc -l </tmp/backup.log) | cmp - /tmp/backup.log || die $1: the log of the instant
    [ $(wc -l </tmp/backup.log) -ge 2 ] || die $1: the writer had not begun
    # The comparison can fail: a backup of the disk itself is not the instant.
    (cd /mnt/disk/settled && find . -type f | sort | xargs sha256sum) >/tmp/disk.sums
    ! cmp -s /tmp/before.sums /tmp/disk.sums || die $1: the disk is still the instant
    [ "$($DMSETUP table $1)" = "$2" ] || die "$1: the table is not the first one: $($DMSETUP table $1)"
    [ "$($DMSETUP ls | cut -f1)" = $1 ] || die "$1: devices are left: $($DMSETUP ls)"
    seq 1 $(wc -l </tmp/acknowledged) | cmp - /mnt/disk/log || die $1: numbers are lost
    umount /mnt/disk
    $DMSETUP remove $1
    dmsetup create seen --table "$2"
    mount -o ro,$3 /dev/mapper/seen /mnt/disk
    (cd /mnt/disk/settled && find . -type f | sort | xargs sha256sum) | cmp - /tmp/disk.sums || die $1: files are lost
    umount /mnt/disk
    dmsetup remove seen
    say done.$1 $SIDE $(wc -l </tmp/acknowledged)
}

linear() {
    $DMSETUP create home --table "0 81920 linear /dev/vda 2048"
    mkfs.ext4 -q -F -E lazy_itable_init=0 /dev/mapper/home
    mount /dev/mapper/home /mnt/disk
    begin
    live_linear home /dev/vdb /mnt/snapshot /tmp/backup || die live_linear
    end home "0 81920 linear $(cat /sys/block/vda/dev) 2048" noload
}

xfs() {
    $DMSETUP create plain --table "0 131072 linear /dev/vdc 2048"
    # Smaller than mkfs.xfs likes it: most of the time was spent on zeroing its log.
    mkfs.xfs -q -f --unsupported -l size=8m /dev/mapper/plain 2>/tmp/mkfs.log || die "mkfs.xfs: $(cat /tmp/mkfs.log)"
    mount -t xfs /dev/mapper/plain /mnt/disk
    begin
    live_xfs plain /dev/vdb /mnt/snapshot /tmp/backup || die live_xfs
    end plain "0 131072 linear $(cat /sys/block/vdc/dev) 2048" norecovery
}

# A volume rolled back, with its content looked at in the middle, and when it is done.
# The program reads it past the page cache. It lies on a device of the harness whose
# second half, from the roll-back on, keeps writes waiting until it has been looked at.
content() { dd if=/dev/mapper/vol bs=64k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1; }
roll() {
    modprobe dm-delay
    cat >/tmp/stall <<'END_OF_STALL'
#!/bin/sh
# stall LENGTH MILLISECONDS: how long writes to the second half wait; not the flushes.
half=$(($1 / 2))
there="/dev/vda $((200000 + half))"
dmsetup reload stall --table "0 $half linear /dev/vda 200000
$half $half delay $there 0 $there $2 $there 0" && dmsetup resume stall
END_OF_STALL
    cat >/tmp/before <<'END_OF_BEFORE'
#!/bin/sh
dd if=/dev/urandom of=/dev/mapper/vol bs=1M count=16 oflag=direct 2>/dev/null
END_OF_BEFORE
    # What is new is written to the snapshot and to the volume, at last to their first
    # half: there the merge begins.
    cat >/tmp/scatter <<'END_OF_SCATTER'
#!/bin/sh
dm-player /test/scattered >/tmp/scattered || exit 1
grep -c '^outcome [0-9]* 0' /tmp/scattered >/tmp/written
dd if=/dev/mapper/vol-snap bs=64k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1 >/tmp/wanted
sync # what is still to be written must not wait
/tmp/stall 32768 600000
END_OF_SCATTER
    # A merge has come to the second half, or at least begun, before its status is
    # asked for.
    cat >/tmp/begun <<'END_OF_BEGUN'
#!/bin/sh
"$TRACED" status $1 >/tmp/status
grep -q snapshot-merge /tmp/status || exec cp /tmp/status /tmp/status.before
allocated() { awk '{ split($4, sectors, "/"); print sectors[1] }' $1; }
tries=1200
until [ $(allocated /tmp/status) -lt $(allocated /tmp/status.before) ] || [ $tries = 0 ]; do
    tries=$((tries - 1))
    usleep 100000
    "$TRACED" status $1 >/tmp/status
done
END_OF_BEGUN
    cat >/tmp/rolled <<'END_OF_ROLLED'
#!/bin/sh
dd if=/dev/mapper/vol bs=64k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1 >/tmp/rolled.sum
/tmp/stall 32768 0
END_OF_ROLLED
    chmod +x /tmp/stall /tmp/before /tmp/scatter /tmp/begun /tmp/rolled
    dmsetup create stall --major $(awk '$2 == "device-mapper" { print $1 }' /proc/devices) --minor 999 --table "0 32768 linear /dev/vda 200000"
    export BEFORE_STATUS=/tmp/begun
    BEFORE=/tmp/before AFTER=/tmp/scatter ROLLED=/tmp/rolled roll_back vol /dev/mapper/stall 0 32768 /dev/vdb 8192 32768 >/tmp/told || die "roll_back: $(cat /tmp/told)"
    unset BEFORE_STATUS
    [ $(cat /tmp/written) = $WRITES ] || die "roll_back: $(cat /tmp/written) writes, not $WRITES"
    [ $(cat /tmp/wanted) = $(cat /tmp/rolled.sum) ] || die roll_back: not rolled back at once
    [ $(cat /tmp/wanted) = $(content) ] || die roll_back: not rolled back at the end
    sed "s/^/told.$SIDE /" /tmp/told
    [ $($DMSETUP ls | cut -f1 | grep -v stall) = vol ] || die "devices are left: $($DMSETUP ls)"
    $DMSETUP remove vol
    dmsetup remove stall
}

# follow WHAT: with dmsetup, then with nbdsnap in its place; what they print.
follow() {
    SIDE=kernel
    trace /tmp/$1.kernel dmsetup
    $1
    say uptime.kernel $(cut -d' ' -f1 /proc/uptime)
    dd if=/dev/zero of=/dev/vdb bs=1M count=24 conv=fsync 2>/dev/null
    serve_dm
    SIDE=nbdsnap
    trace /tmp/$1.nbdsnap /test/dmsetup_by_nbdsnap
    $1
    stop_server
    say uptime.nbdsnap $(cut -d' ' -f1 /proc/uptime)
    same /tmp/$1
}
