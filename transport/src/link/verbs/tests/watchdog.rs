//! Requests that the device never ends.

use super::*;
use crate::link::{OneSided, Registration, RemoteId};

const TICK: Duration = Duration::from_millis(100);

impl Setting {
    /// Its link looks often.
    pub(super) fn looks_often(&mut self) {
        self.link.watchdog().set_tick(TICK);
    }

    /// What was sent ends well.
    pub(super) fn end_sends(&self) {
        while !self.fake.state().sent.is_empty() {
            self.fake.end_send(ffi::IBV_WC_SUCCESS);
        }
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

/// What a link can be at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Request {
    Message,
    Read,
    Marker,
    Put,
}

/// What requests are made of.
struct Requests {
    bytes: Vec<u8>,
    to: Vec<u8>,
    _region: (Vec<u8>, Arc<dyn Registration>),
    remote: RemoteId,
    payloads: u32,
    last: Instant,
}

impl Requests {
    fn new(setting: &mut Setting) -> Requests {
        let mut reached = vec![0; 8];
        let region = setting.link.register(place(&mut reached)[0], true, true);
        let region = region.expect("registered");
        let remote = setting.link.open(region.grant()).expect("opened");
        Requests {
            bytes: pattern(64 << 10),
            to: vec![0; 64 << 10],
            _region: (reached, region),
            remote,
            payloads: 0,
            last: Instant::now(),
        }
    }

    fn begin(&mut self, setting: &mut Setting, what: Request) {
        match what {
            Request::Message => assert_eq!(setting.post(b"x").expect("posted"), Post::Done),
            Request::Put => {
                let posted = setting.link.put(OP, segment(b"x"), self.remote, 0);
                assert_eq!(posted.expect("posted"), Post::Pending);
            }
            Request::Read | Request::Marker => {
                self.payloads += 1;
                setting.driver.landings.push_back(place(&mut self.to));
                setting.offer(self.payloads, &self.bytes);
            }
        }
        // The fake tells nobody.
        setting.woken.0.fetch_add(1, Ordering::SeqCst);
    }

    /// The same, if the last time was a while ago.
    fn go_on(&mut self, setting: &mut Setting, what: Request) {
        if self.last.elapsed() > TICK / 10 {
            self.last = Instant::now();
            self.begin(setting, what);
        }
    }
}

/// One request of a kind ends well, another one never, while requests go on ending at other pairs.
fn never_ends(what: Request) {
    for asleep in [true, false] {
        let mut setting = watched();
        let mut requests = Requests::new(&mut setting);
        requests.begin(&mut setting, what);
        let settled = |setting: &mut Setting| {
            setting.end_sends();
            setting.link.flushed() && what == Request::Message || !setting.driver.done.is_empty()
        };
        assert!(setting.asleep_until(settled).is_none());
        // Somebody has looked by then.
        assert!(setting.asleep_for(2 * TICK).is_none());
        {
            let mut state = setting.fake.state();
            state.holds_reads = what == Request::Read;
            state.holds_markers = what == Request::Marker;
            state.holds_reaching = what == Request::Put;
        }
        setting.driver.done.clear();
        let began = Instant::now();
        requests.begin(&mut setting, what);
        let other = match what {
            Request::Message | Request::Put => Request::Read,
            Request::Read | Request::Marker => Request::Put,
        };
        let go_on = |setting: &mut Setting| {
            requests.go_on(setting, other);
            if what != Request::Message {
                setting.end_sends();
            }
            false
        };
        let ended = if asleep { setting.asleep_until(go_on) } else { setting.busy_until(go_on) };
        is_silence(ended);
        assert!(began.elapsed() >= setting.silence_max());
        assert!(setting.driver.done.len() > 2, "nothing else ended meanwhile");
        assert!(setting.driver.done.iter().all(|(_, result)| result.is_ok()));
        assert_eq!(setting.kill(), Killed::Over);
    }
}

#[test]
fn a_message_that_never_ends_ends_the_link() {
    never_ends(Request::Message);
}

#[test]
fn a_read_that_never_ends_ends_the_link() {
    never_ends(Request::Read);
}

#[test]
fn a_marker_that_never_ends_ends_the_link() {
    never_ends(Request::Marker);
}

#[test]
fn a_put_that_never_ends_ends_the_link() {
    never_ends(Request::Put);
}

/// A process that was stopped, or a link that nobody polled: that counts as one look that was missed.
#[test]
fn time_in_which_nobody_looked_does_not_count() {
    let mut setting = watched();
    setting.post(b"x").expect("posted");
    assert!(setting.asleep_for(TICK / 2).is_none());
    std::thread::sleep(2 * setting.silence_max());
    for _ in 0..20 {
        setting.poll().expect("the link works");
        setting.arm();
    }
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    let silence = setting.silence_max();
    assert!(setting.asleep_for(silence).is_none());
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
