//! For whom a beat is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use super::board::{Board, Pulse};
use crate::link::OpId;

const OP: OpId = OpId { index: 1, generation: 0 };
const OTHER: OpId = OpId { index: 2, generation: 0 };

#[derive(Default)]
struct Count(AtomicUsize);

impl Count {
    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A pulse, and how often the resident task was woken.
fn pulse() -> (Arc<Board>, Arc<Pulse>, Arc<Count>) {
    let (board, resident) = (Arc::<Board>::default(), Arc::<Count>::default());
    board.register_resident(&Waker::from(resident.clone()));
    (board.clone(), Pulse::new(7, board), resident)
}

/// What the resident task finds: how many endpoints before it, how many newly watched.
fn found(board: &Board) -> (usize, usize) {
    let (mut ready, mut watched) = (Vec::new(), Vec::new());
    board.take_ready(&mut ready);
    board.take_watched(&mut watched);
    ready.iter().for_each(|pulse| pulse.dequeued());
    (ready.len(), watched.len())
}

#[test]
fn a_beat_that_nobody_waits_for_is_for_the_resident_task() {
    let (board, pulse, resident) = pulse();
    pulse.wake_by_ref();
    pulse.wake_by_ref();
    assert_eq!((found(&board), resident.get()), ((1, 0), 1));
    pulse.wake_by_ref();
    assert_eq!(found(&board), (1, 0));
}

#[test]
fn a_beat_while_an_operation_lets_others_run_is_for_the_operation() {
    let (board, pulse, _) = pulse();
    pulse.yielding();
    assert_eq!(found(&board), (0, 1), "the watch sees to it that it is polled");
    pulse.wake_by_ref();
    assert_eq!(found(&board), (0, 0), "it is watched already");
    pulse.unwatched();
    pulse.yielding();
    assert_eq!(found(&board), (0, 1), "it is put on the list again");
}

#[test]
fn once_polled_or_taken_over_or_ended_beats_are_for_the_resident_task() {
    let ways: [fn(&Arc<Pulse>); 2] = [|pulse| pulse.polled(), |pulse| pulse.unwatched()];
    for way in ways {
        let (board, pulse, _) = pulse();
        pulse.yielding();
        found(&board);
        way(&pulse);
        pulse.wake_by_ref();
        assert_eq!(found(&board), (1, 0));
    }
    let (board, pulse, _) = pulse();
    pulse.yielding();
    found(&board);
    pulse.ended_early(OP);
    assert_eq!(found(&board), (1, 0), "the resident task takes over at once");
    pulse.wake_by_ref();
    assert_eq!(found(&board), (1, 0));
}

#[test]
fn a_leader_is_woken_also_while_another_operation_lets_others_run() {
    let (board, pulse, _) = pulse();
    let leader = Arc::<Count>::default();
    assert!(pulse.lead(OP, &Waker::from(leader.clone())).is_none());
    pulse.yielding();
    found(&board);
    pulse.wake_by_ref();
    assert_eq!((leader.get(), found(&board)), (1, (0, 0)));
    // It has been woken, and the other one is still to be polled.
    pulse.wake_by_ref();
    assert_eq!((leader.get(), found(&board)), (1, (0, 0)));
}

#[test]
fn the_end_of_one_operation_does_not_unseat_another() {
    let (board, pulse, _) = pulse();
    let leader = Arc::<Count>::default();
    assert!(pulse.lead(OP, &Waker::from(leader.clone())).is_none());
    pulse.ended_early(OTHER);
    assert_eq!(found(&board), (1, 0));
    pulse.wake_by_ref();
    assert_eq!(leader.get(), 1);
    // Watched, because the leader may never be polled.
    assert_eq!(found(&board), (0, 1));
}
