//! Requests that the device never ends.

use super::super::watchdog::SILENCE_MAX;
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

impl Setting {
    /// As the resident task drives a link that sleeps: it is polled when it is woken. Its error, if it
    /// ends within this time.
    fn asleep(&mut self, time: Duration) -> Option<LinkError> {
        let until = Instant::now() + time;
        let waker = Waker::from(self.woken.clone());
        let mut cx = Context::from_waker(&waker);
        while Instant::now() < until {
            let armed = self.link.arm(&mut cx);
            let woken = self.woken.0.load(Ordering::SeqCst);
            while matches!(armed, Ok(Armed::Yes)) && self.woken.0.load(Ordering::SeqCst) == woken {
                if Instant::now() >= until {
                    return None;
                }
                self.host.drain().expect("events");
                self.timers.poll_expired(&mut cx).expect("timers");
            }
            loop {
                match self.poll() {
                    Ok(Progress::Idle) => break,
                    Ok(_) => {}
                    Err(error) => return Some(error),
                }
            }
        }
        None
    }
}

fn is_silence(error: &LinkError) {
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    let text = &error.detail;
    assert!(text.contains("nothing that was posted at") && text.contains("has ended"), "{text}");
}

#[test]
fn a_link_that_sleeps_ends_if_the_device_ends_nothing() {
    let mut setting = setting();
    setting.post(b"a message").expect("posted");
    let began = Instant::now();
    is_silence(&setting.asleep(PATIENCE).expect("it goes on"));
    assert!(began.elapsed() >= SILENCE_MAX);
}

#[test]
fn a_link_that_is_kept_busy_ends_if_the_device_ends_nothing() {
    let mut setting = setting();
    setting.fake.state().holds_reads = true;
    let bytes = pattern(100 << 10);
    let mut place_of = vec![0; bytes.len()];
    setting.driver.landings.push_back(place(&mut place_of));
    setting.offer(1, &bytes);
    let began = Instant::now();
    is_silence(&setting.end_while_busy());
    assert!(began.elapsed() >= SILENCE_MAX);
    assert_eq!(setting.kill(), Killed::Over);
}

/// Something ends now and then, though there is always something under way.
#[test]
fn a_slow_device_is_not_a_silent_one() {
    let mut setting = setting();
    setting.post(b"a message").expect("posted");
    for _ in 0..4 {
        setting.post(b"a message").expect("posted");
        assert!(setting.asleep(SILENCE_MAX / 2).is_none());
        setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    }
}

/// Nobody waits for the end of a send, so it is not looked at.
#[test]
fn a_link_that_rests_is_left_alone() {
    let mut setting = setting();
    setting.post(b"a message").expect("posted");
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    assert!(setting.asleep(SILENCE_MAX).is_none());
    let before = setting.woken.0.load(Ordering::SeqCst);
    assert!(setting.asleep(SILENCE_MAX).is_none());
    assert_eq!(setting.woken.0.load(Ordering::SeqCst), before, "woken for nothing");
}
