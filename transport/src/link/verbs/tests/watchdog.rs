//! Requests that the device never ends.

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

impl Setting {
    /// Its link looks often.
    pub(super) fn looks_often(&mut self) {
        self.link.watchdog().set_tick(Duration::from_millis(150));
    }

    /// As the resident task drives a link that sleeps: it is polled when it is woken. Its error, if it
    /// ends before this holds.
    pub(super) fn asleep_until(
        &mut self,
        mut holds: impl FnMut(&mut Setting) -> bool,
    ) -> Option<LinkError> {
        let until = Instant::now() + PATIENCE;
        let waker = Waker::from(self.woken.clone());
        let mut cx = Context::from_waker(&waker);
        loop {
            loop {
                match self.poll() {
                    Ok(Progress::Idle) => break,
                    Ok(_) => {}
                    Err(error) => return Some(error),
                }
            }
            let armed = self.link.arm(&mut cx);
            let woken = self.woken.0.load(Ordering::SeqCst);
            loop {
                if holds(self) {
                    return None;
                }
                assert!(Instant::now() < until, "it goes on for {PATIENCE:?}");
                let is_woken = self.woken.0.load(Ordering::SeqCst) != woken;
                if is_woken || !matches!(armed, Ok(Armed::Yes)) {
                    break;
                }
                self.host.drain().expect("events");
                self.timers.poll_expired(&mut cx).expect("timers");
            }
        }
    }

    /// As an operation drives it that never rests.
    pub(super) fn busy_until(
        &mut self,
        mut holds: impl FnMut(&mut Setting) -> bool,
    ) -> Option<LinkError> {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "it goes on for {PATIENCE:?}");
            if let Err(error) = self.poll() {
                return Some(error);
            }
        }
        None
    }

    fn asleep_for(&mut self, time: Duration) -> Option<LinkError> {
        let until = Instant::now() + time;
        self.asleep_until(|_| Instant::now() >= until)
    }

    fn silence_max(&mut self) -> Duration {
        self.link.watchdog().silence_max()
    }
}

/// A link that looks often.
fn watched() -> Setting {
    let mut setting = setting();
    setting.looks_often();
    setting
}

fn is_silence(ended: Option<LinkError>) {
    let error = ended.expect("it is over");
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    assert!(error.detail.contains("has ended nothing for"), "{}", error.detail);
}

#[test]
fn a_link_that_sleeps_ends_if_the_device_ends_nothing() {
    let mut setting = watched();
    setting.post(b"a message").expect("posted");
    let began = Instant::now();
    is_silence(setting.asleep_until(|_| false));
    assert!(began.elapsed() >= setting.silence_max());
}

#[test]
fn a_link_that_is_kept_busy_ends_if_the_device_ends_nothing() {
    let mut setting = watched();
    setting.fake.state().holds_reads = true;
    let bytes = pattern(100 << 10);
    let mut place_of = vec![0; bytes.len()];
    setting.driver.landings.push_back(place(&mut place_of));
    setting.offer(1, &bytes);
    let began = Instant::now();
    is_silence(setting.busy_until(|_| false));
    assert!(began.elapsed() >= setting.silence_max());
    assert_eq!(setting.kill(), Killed::Over);
}

/// A message is never sent, while payloads come one after the other: those are read by another pair.
#[test]
fn a_queue_pair_that_ends_nothing_is_not_hidden_by_others() {
    for asleep in [true, false] {
        let mut setting = watched();
        setting.post(b"a message").expect("posted");
        let bytes = pattern(100 << 10);
        let mut to = vec![0; bytes.len()];
        let (mut payloads, mut last) = (0, Instant::now());
        let feed = |setting: &mut Setting| {
            if last.elapsed() > Duration::from_millis(40) {
                (payloads, last) = (payloads + 1, Instant::now());
                setting.driver.landings.push_back(place(&mut to));
                setting.offer(payloads, &bytes);
                // The fake tells nobody.
                setting.woken.0.fetch_add(1, Ordering::SeqCst);
            }
            false
        };
        let ended = match asleep {
            true => setting.asleep_until(feed),
            false => setting.busy_until(feed),
        };
        is_silence(ended);
        let ended = setting.driver.done.len();
        assert!(ended > 5 && ended as u32 >= payloads - 1, "{ended} of {payloads}");
    }
}

/// Something ends now and then, though there is always something under way.
#[test]
fn a_slow_device_is_not_a_silent_one() {
    let mut setting = watched();
    setting.post(b"a message").expect("posted");
    for _ in 0..6 {
        setting.post(b"a message").expect("posted");
        let half = setting.silence_max() / 2;
        assert!(setting.asleep_for(half).is_none());
        setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    }
}

/// Who rested between requests has not been silent.
#[test]
fn requests_that_each_end_in_time_do_not_add_up() {
    let mut setting = watched();
    for _ in 0..6 {
        setting.post(b"a message").expect("posted");
        let (half, whole) = (setting.silence_max() / 2, setting.silence_max());
        assert!(setting.asleep_for(half).is_none());
        setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert!(setting.asleep_for(whole).is_none());
    }
}

/// Nobody waits for the end of a send, so it is not looked at.
#[test]
fn a_link_that_rests_is_left_alone() {
    let mut setting = watched();
    setting.post(b"a message").expect("posted");
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    let silence = setting.silence_max();
    assert!(setting.asleep_for(silence).is_none());
    let before = setting.woken.0.load(Ordering::SeqCst);
    assert!(setting.asleep_for(silence).is_none());
    assert_eq!(setting.woken.0.load(Ordering::SeqCst), before, "woken for nothing");
}
