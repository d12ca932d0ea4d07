//! Handles of records in maps that other CPUs and other programs write at the same time.
//!
//! A reference to such a record would be unsound: another reference to the record can exist. A handle is a raw pointer, and
//! each access to a field is atomic or volatile.

use core::arch::asm;

use abi::{
    Counters, Losses,
    event::{BUCKETS, Budget, Call, Limit, Slot, Tally},
    judge::verdict,
};

/// A number in a record.
#[derive(Clone, Copy)]
pub(crate) struct Cell(*mut u64);

impl Cell {
    /// Adds one atomically. Per-CPU entries need this too: on the same CPU, a program can be preempted by a program of another
    /// task, or interrupted by sock_ops in softirq.
    #[inline(always)]
    pub(crate) fn increment(self) {
        self.add(1);
    }

    /// Adds atomically.
    ///
    /// In assembly, because the target declares no compare-and-swap (the first instruction set had none), and `core` then
    /// provides no `fetch_add` either. All kernels have had this instruction.
    #[inline(always)]
    pub(crate) fn add(self, amount: u64) {
        // SAFETY: the number is in a record that is valid while the program runs, and the kernel aligns it.
        unsafe {
            asm!(
                "lock *(u64 *)({cell} + 0) += {amount}",
                cell = in(reg) self.0,
                amount = in(reg) amount,
            );
        }
    }

    /// Returns the number. A race between CPUs can at worst return an older one.
    #[inline(always)]
    pub(crate) fn get(self) -> u64 {
        // SAFETY: as in `add`.
        unsafe { self.0.read_volatile() }
    }

    /// Stores a number. A race between CPUs can at worst lose it.
    #[inline(always)]
    pub(crate) fn set(self, value: u64) {
        // SAFETY: as in `add`.
        unsafe { self.0.write_volatile(value) };
    }
}

/// Defines the handle of a record, with a function for each field.
macro_rules! handle {
    ($(#[$doc:meta])* $handle:ident, $record:ty, $($field:ident),+) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $handle(*mut $record);

        impl $handle {
            /// # Safety
            ///
            /// `record` must be valid while the program runs, and no reference to it may exist.
            #[inline(always)]
            pub(crate) unsafe fn new(record: *mut $record) -> Self {
                Self(record)
            }

            $(
                #[inline(always)]
                pub(crate) fn $field(self) -> Cell {
                    // SAFETY: a field of a valid record.
                    Cell(unsafe { &raw mut (*self.0).$field })
                }
            )+
        }
    };
}

handle!(
    /// The counters of a setting on one CPU.
    CountersRef, Counters, set, unchanged, failed, failed_errno, agreed, reads, reported, suppressed, undone
);
handle!(
    /// What was lost.
    LossesRef,
    Losses,
    ring_full,
    calls_full,
    unreadable,
    no_storage,
    no_room,
    exit_missed,
    tallies_full,
    unjudged,
    not_restored,
    over_budget
);
handle!(
    /// The calls of one kind on one option, on one CPU.
    TallyRef, Tally, calls, failed, total_ns
);
handle!(
    /// When an event was last sent.
    LimitRef, Limit, sent_ns, suppressed
);
handle!(
    /// What a cgroup, a target or all targets have used of a budget.
    BudgetRef, Budget, until_ns
);

handle!(
    /// The slot of a call.
    SlotRef, Slot, holders
);

impl SlotRef {
    /// Returns the thread that holds the slot.
    #[inline(always)]
    pub(crate) fn thread(self) -> Cell {
        // SAFETY: a field of a valid record.
        Cell(unsafe { &raw mut (*self.0).call.thread })
    }

    /// Returns the record of the call. Only the holding thread may access it.
    #[inline(always)]
    pub(crate) fn call(self) -> *mut Call {
        // SAFETY: a field of a valid record.
        unsafe { &raw mut (*self.0).call }
    }
}

impl CountersRef {
    /// Returns the counter of a verdict minus one.
    #[inline(always)]
    pub(crate) fn verdict(self, index: usize) -> Option<Cell> {
        if index >= verdict::COUNT {
            return None;
        }
        // SAFETY: an element of an array in a valid record, within its bounds.
        Some(Cell(unsafe { (&raw mut (*self.0).verdicts).cast::<u64>().add(index) }))
    }

    /// Returns the counter of a verdict minus one, if that is a constant.
    #[inline(always)]
    pub(crate) fn verdict_at<const INDEX: usize>(self) -> Cell {
        const { assert!(INDEX < verdict::COUNT) };
        // SAFETY: as in `verdict`.
        Cell(unsafe { (&raw mut (*self.0).verdicts).cast::<u64>().add(INDEX) })
    }
}

impl TallyRef {
    /// Returns the number of calls in a bucket.
    #[inline(always)]
    pub(crate) fn bucket(self, index: usize) -> Cell {
        // The mask proves to the verifier that the index is within the bounds.
        let index = index & (BUCKETS - 1);
        // SAFETY: an element of an array in a valid record, within its bounds.
        Cell(unsafe { (&raw mut (*self.0).buckets).cast::<u64>().add(index) })
    }
}
