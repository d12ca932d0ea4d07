// A 32-bit program without libraries. It makes calls by both kinds of system calls that such programs have. It prints
// its process id, then `CALL LEVEL OPTNAME RESULT VALUE` for each call.

enum { EXIT = 1, WRITE = 4, GETPID = 20, SOCKETCALL = 102, SOCKET = 359, GETSOCKOPT = 365, SETSOCKOPT = 366 };
enum { IN_SOCKETCALL_SETSOCKOPT = 14, IN_SOCKETCALL_GETSOCKOPT = 15 };
enum { SOL_SOCKET = 1, SO_TYPE = 3, SO_KEEPALIVE = 9, SO_RCVTIMEO = 20 };
enum { SOL_TCP = 6, TCP_NODELAY = 1, TCP_KEEPIDLE = 4, TCP_SYNCNT = 7 };

static int call(int number, long a, long b, long c, long d, long e) {
  int result;
  __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
  return result;
}

static char line[128], *end = line;

static void put(char c) { *end++ = c; }

static void text(const char *s) {
  while (*s) put(*s++);
}

static void number(int n) {
  char digits[12];
  int len = 0;
  unsigned left = n < 0 ? -(unsigned)n : (unsigned)n;
  if (n < 0) put('-');
  do digits[len++] = '0' + left % 10;
  while (left /= 10);
  while (len) put(digits[--len]);
}

static void say(void) {
  put('\n');
  call(WRITE, 1, (long)line, end - line, 0, 0);
  end = line;
}

static void print_call(const char *name, int level, int option, int result, const unsigned char *value, int len) {
  text(name);
  put(' '), number(level), put(' '), number(option), put(' '), number(result), put(' ');
  text(len ? "0x" : "-");
  for (int n = 0; n < len; n++) put("0123456789abcdef"[value[n] >> 4]), put("0123456789abcdef"[value[n] & 15]);
  say();
}

static int direct = 1;

static void set(int fd, int level, int option, const void *value, int len) {
  long arguments[] = {fd, level, option, (long)value, len};
  int result = direct ? call(SETSOCKOPT, fd, level, option, (long)value, len)
                      : call(SOCKETCALL, IN_SOCKETCALL_SETSOCKOPT, (long)arguments, 0, 0, 0);
  print_call("setsockopt", level, option, result, value, len);
}

static void get(int fd, int level, int option) {
  unsigned char value[4] = {0};
  int len = 4;
  long arguments[] = {fd, level, option, (long)value, (long)&len};
  int result = direct ? call(GETSOCKOPT, fd, level, option, (long)value, (long)&len)
                      : call(SOCKETCALL, IN_SOCKETCALL_GETSOCKOPT, (long)arguments, 0, 0, 0);
  print_call("getsockopt", level, option, result, value, result < 0 ? 0 : len);
}

void _start(void) {
  int off = 0, on = 1, many = 50, seconds[] = {3, 500000};
  number(call(GETPID, 0, 0, 0, 0, 0));
  say();
  int fd = call(SOCKET, 2, 1, 0, 0, 0);
  set(fd, SOL_TCP, TCP_NODELAY, &on, 4);
  set(fd, SOL_TCP, TCP_NODELAY, &off, 4);
  get(fd, SOL_TCP, TCP_NODELAY);
  set(fd, SOL_TCP, TCP_KEEPIDLE, &off, 4);
  set(fd, SOL_TCP, 9999, &on, 4);
  direct = 0;
  set(fd, SOL_TCP, TCP_SYNCNT, &many, 4);
  set(fd, SOL_SOCKET, SO_KEEPALIVE, &off, 4);
  get(fd, SOL_SOCKET, SO_TYPE);
  set(fd, SOL_SOCKET, SO_RCVTIMEO, seconds, 8);
  call(EXIT, 0, 0, 0, 0, 0);
}
