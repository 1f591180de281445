//! Byte credit: how much a sender may have on its way, and what a receiver holds of it.
//!
//! Both sides count bytes since the endpoint came up, so that a grant is one number, a lost
//! intermediate one does no harm, and nothing has to be taken back. A cost is what a parcel weighs
//! in the receiver's memory, headers included; both sides must compute it with the functions here.
//!
//! A cost larger than the window is admitted alone: when nothing else is outstanding.

use std::fmt;

/// What a message weighs besides its payload, in bytes.
const MESSAGE_OVERHEAD: u64 = 64;
/// What each frame weighs besides its bytes.
const FRAME_OVERHEAD: u64 = 32;
/// What a tagged arrival weighs besides the bytes that travel with it.
const TAG_OVERHEAD: u64 = 64;

/// What a message weighs, in bytes of credit.
#[inline]
pub(crate) fn message_cost(payload_len: u64, frames: u32) -> u64 {
    payload_len.saturating_add(MESSAGE_OVERHEAD + FRAME_OVERHEAD * u64::from(frames))
}

/// What a tagged arrival weighs, in bytes of credit. `eager_len` is the length of what travels
/// before it is matched: the payload if it is sent eagerly, 0 if it is offered.
pub(crate) fn tag_cost(eager_len: u64) -> u64 {
    eager_len.saturating_add(TAG_OVERHEAD)
}

/// What a peer cannot rightly do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CreditError {
    /// A grant that is smaller than an earlier one.
    Backwards { granted: u64, before: u64 },
    /// A grant for more than was ever sent.
    BeyondTaken { granted: u64, taken: u64 },
    /// More was sent than the window allows.
    Exceeded { cost: u64, outstanding: u64, window: u64 },
}

impl fmt::Display for CreditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CreditError::Backwards { granted, before } => {
                write!(f, "credit went back from {before} to {granted} bytes")
            }
            CreditError::BeyondTaken { granted, taken } => {
                write!(f, "credit for {granted} bytes when {taken} were sent")
            }
            CreditError::Exceeded { cost, outstanding, window } => {
                write!(
                    f,
                    "{cost} bytes sent on top of {outstanding} outstanding, in a window of {window}"
                )
            }
        }
    }
}

impl std::error::Error for CreditError {}

/// Whether `cost` may join `outstanding` in this window. The one rule, for both sides.
#[inline]
fn admits(window: u64, outstanding: u64, cost: u64) -> bool {
    outstanding == 0 || outstanding.checked_add(cost).is_some_and(|sum| sum <= window)
}

/// The sender's side.
#[derive(Clone, Debug)]
pub(crate) struct SendCredit {
    window: u64,
    taken: u64,
    granted: u64,
}

impl SendCredit {
    /// `window`: what the receiver said it takes, in bytes.
    pub fn new(window: u64) -> Self {
        SendCredit { window, taken: 0, granted: 0 }
    }

    /// Takes `cost` bytes if they are to be had.
    #[inline]
    pub fn try_take(&mut self, cost: u64) -> bool {
        if !admits(self.window, self.outstanding(), cost) {
            return false;
        }
        let Some(taken) = self.taken.checked_add(cost) else {
            return false;
        };
        self.taken = taken;
        true
    }

    /// Whether `try_take` would succeed.
    pub fn admits(&self, cost: u64) -> bool {
        admits(self.window, self.outstanding(), cost)
    }

    /// Takes back a `try_take` whose parcel did not go out.
    pub fn give_back(&mut self, cost: u64) {
        debug_assert!(cost <= self.outstanding(), "only what was taken can be given back");
        self.taken = self.taken.saturating_sub(cost).max(self.granted);
    }

    /// The receiver has consumed this many bytes since the beginning.
    pub fn grant(&mut self, cumulative: u64) -> Result<(), CreditError> {
        if cumulative < self.granted {
            return Err(CreditError::Backwards { granted: cumulative, before: self.granted });
        }
        if cumulative > self.taken {
            return Err(CreditError::BeyondTaken { granted: cumulative, taken: self.taken });
        }
        self.granted = cumulative;
        Ok(())
    }

    /// Bytes taken and not yet granted again. More than the window only while a single cost that
    /// exceeds it is on its way.
    pub fn outstanding(&self) -> u64 {
        self.taken - self.granted
    }

    /// Bytes that can be taken now without the rule for what is larger than the window.
    pub fn available(&self) -> u64 {
        self.window.saturating_sub(self.outstanding())
    }
}

/// The receiver's side.
#[derive(Clone, Debug)]
pub(crate) struct RecvCredit {
    window: u64,
    /// How much is consumed between two reports.
    report_every: u64,
    charged: u64,
    consumed: u64,
    reported: u64,
}

impl RecvCredit {
    /// `window`: what this side told the sender, in bytes.
    pub fn new(window: u64) -> Self {
        let report_every = (window / 4).max(1);
        RecvCredit { window, report_every, charged: 0, consumed: 0, reported: 0 }
    }

    /// A parcel of this cost has arrived. Charged before anything is done for it.
    #[inline]
    pub fn charge(&mut self, cost: u64) -> Result<(), CreditError> {
        // What the sender believes is outstanding is at least this: it may not have seen the last
        // report yet.
        let outstanding = self.charged - self.reported;
        let charged = self.charged.checked_add(cost);
        match charged.filter(|_| admits(self.window, outstanding, cost)) {
            Some(charged) => {
                self.charged = charged;
                Ok(())
            }
            None => Err(CreditError::Exceeded { cost, outstanding, window: self.window }),
        }
    }

    /// This side has let go of as many bytes as were charged for some parcel.
    #[inline]
    pub fn consume(&mut self, cost: u64) {
        debug_assert!(cost <= self.resident(), "no more can be consumed than was charged");
        self.consumed = self.consumed.saturating_add(cost).min(self.charged);
    }

    /// The number to report to the sender, if it is time: a quarter of the window has been
    /// consumed since the last report, or anything at all when the sender is `starved`.
    pub fn take_due(&mut self, starved: bool) -> Option<u64> {
        if !self.is_due(starved) {
            return None;
        }
        self.reported = self.consumed;
        Some(self.reported)
    }

    /// Whether `take_due` would give a number.
    #[inline]
    pub fn is_due(&self, starved: bool) -> bool {
        let enough = if starved { 1 } else { self.report_every };
        self.consumed - self.reported >= enough
    }

    /// The number last reported.
    pub fn reported(&self) -> u64 {
        self.reported
    }

    /// Bytes charged and not yet consumed: what this side holds for the sender.
    pub fn resident(&self) -> u64 {
        self.charged - self.consumed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn large_cost_goes_alone() {
        let mut send = SendCredit::new(100);
        assert!(send.try_take(10));
        assert!(!send.try_take(1000));
        send.grant(10).unwrap();
        assert!(send.try_take(1000));
        assert_eq!((send.outstanding(), send.available()), (1000, 0));
        assert!(!send.try_take(1));
        send.grant(1010).unwrap();
        assert_eq!(send.available(), 100);
    }

    #[test]
    fn false_grants_are_refused() {
        let mut send = SendCredit::new(100);
        assert!(send.try_take(50));
        assert_eq!(send.grant(51), Err(CreditError::BeyondTaken { granted: 51, taken: 50 }));
        send.grant(20).unwrap();
        assert_eq!(send.grant(19), Err(CreditError::Backwards { granted: 19, before: 20 }));
        assert_eq!(send.outstanding(), 30);
    }

    #[test]
    fn reports_come_by_the_quarter_or_when_starved() {
        let mut recv = RecvCredit::new(100);
        recv.charge(40).unwrap();
        assert_eq!(recv.take_due(true), None);
        recv.consume(24);
        assert_eq!(recv.take_due(false), None);
        recv.consume(1);
        assert_eq!(recv.take_due(false), Some(25));
        recv.consume(1);
        assert_eq!(recv.take_due(false), None);
        assert_eq!(recv.take_due(true), Some(26));
        assert_eq!(recv.take_due(true), None);
        assert_eq!(recv.resident(), 14);
    }

    #[test]
    fn tiny_windows_report_only_what_is_new() {
        let mut recv = RecvCredit::new(3);
        assert_eq!(recv.take_due(false), None);
        recv.charge(1).unwrap();
        recv.consume(1);
        assert_eq!((recv.take_due(false), recv.take_due(false)), (Some(1), None));
    }

    #[test]
    fn greedy_sender_is_found_out() {
        let mut recv = RecvCredit::new(100);
        recv.charge(60).unwrap();
        assert_eq!(
            recv.charge(41),
            Err(CreditError::Exceeded { cost: 41, outstanding: 60, window: 100 })
        );
        recv.charge(40).unwrap();
        // Consumed, but not reported: the sender cannot know.
        recv.consume(100);
        assert!(recv.charge(1).is_err());
        assert_eq!(recv.take_due(false), Some(100));
        recv.charge(u64::MAX - 100).unwrap();
        assert!(recv.charge(1).is_err());
    }

    #[test]
    fn counters_end_without_wrapping() {
        let mut send = SendCredit::new(100);
        assert!(send.try_take(u64::MAX));
        send.grant(u64::MAX).unwrap();
        assert!(!send.try_take(1));
        let mut recv = RecvCredit::new(100);
        recv.charge(u64::MAX).unwrap();
        recv.consume(u64::MAX);
        assert_eq!(recv.take_due(true), Some(u64::MAX));
        assert!(recv.charge(1).is_err());
    }

    #[test]
    fn costs_saturate() {
        assert_eq!(message_cost(8, 1), 104);
        assert_eq!(message_cost(u64::MAX, u32::MAX), u64::MAX);
        assert_eq!(tag_cost(0), 64);
        assert_eq!(tag_cost(u64::MAX), u64::MAX);
    }

    proptest! {
        /// A sender and a receiver that keep the rules never disagree, never hold more than the
        /// window (or one cost), and a starved sender always gets going again.
        #[test]
        fn both_sides_agree(
            window in 0u64..2000,
            steps in prop::collection::vec((0u8..5, 1u64..3000), 0..300),
        ) {
            let mut send = SendCredit::new(window);
            let mut recv = RecvCredit::new(window);
            let mut flying = std::collections::VecDeque::new();
            let mut held = std::collections::VecDeque::new();
            let mut reports = std::collections::VecDeque::new();
            for (step, cost) in steps {
                match step {
                    0 => if send.try_take(cost) { flying.push_back(cost) },
                    1 => if let Some(cost) = flying.pop_front() {
                        recv.charge(cost).unwrap();
                        held.push_back(cost);
                    },
                    // Links may reorder within the window.
                    2 => if let Some(cost) = flying.pop_back() {
                        recv.charge(cost).unwrap();
                        held.push_back(cost);
                    },
                    3 => if let Some(cost) = held.pop_front() {
                        recv.consume(cost);
                        reports.extend(recv.take_due(cost % 2 == 0));
                    },
                    _ => if let Some(report) = reports.pop_front() {
                        send.grant(report).unwrap();
                    },
                }
                let sum: u64 = held.iter().sum();
                prop_assert_eq!(recv.resident(), sum);
                prop_assert!(sum <= window || held.len() == 1);
                let out: u64 = flying.iter().sum::<u64>() + sum;
                prop_assert!(send.outstanding() >= out);
            }
            for cost in flying { recv.charge(cost).unwrap(); held.push_back(cost); }
            for cost in held { recv.consume(cost); }
            reports.extend(recv.take_due(true));
            for report in reports { send.grant(report).unwrap(); }
            prop_assert_eq!(send.outstanding(), 0);
            prop_assert!(send.try_take(1 << 40));
        }
    }
}
