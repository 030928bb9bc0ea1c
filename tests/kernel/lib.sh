# What scripts in the virtual machine share. They run under `set -e`.

# A device of its own for a slice of a disk: slice NAME DISK START LENGTH, in sectors.
slice() { dmsetup create "$1" --table "0 $4 linear $2 $3"; }

# Copy all of one device to another: views are compared outside, byte for byte.
copy() { dd if="$1" of="$2" bs=1M iflag=direct oflag=direct 2>/dev/null || dd if="$1" of="$2" bs=64k conv=fsync 2>/dev/null; }

# The sectors of a device.
sectors() { blockdev --getsz "$1"; }

# A line that the test reads: say KEY VALUE...
say() { echo "$*"; }

# End with a reason.
die() {
    echo "FAILED: $*"
    dmesg | tail -20
    exit 1
}

# status DEVICE: what follows the target's name in its status.
status() { dmsetup status "$1" | sed 's/^[0-9]* [0-9]* [^ ]* *//'; }
