// A server and clients, for the calls that a JVM makes on its own and the calls that a program requests.

import com.sun.net.httpserver.HttpServer;
import java.io.InputStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.StandardSocketOptions;
import java.net.URL;
import java.nio.channels.DatagramChannel;
import java.nio.channels.SocketChannel;
import jdk.net.ExtendedSocketOptions;

class Sockets {
    public static void main(String[] arguments) throws Exception {
        InetAddress loopback = InetAddress.getByName("127.0.0.1");
        HttpServer server = HttpServer.create(new InetSocketAddress(loopback, 0), 0);
        server.createContext("/", exchange -> {
            exchange.sendResponseHeaders(200, 5);
            exchange.getResponseBody().write("hello".getBytes());
            exchange.close();
        });
        server.start();
        InetSocketAddress address = server.getAddress();

        for (int request = 0; request < 3; request++) {
            try (InputStream answer = new URL("http://127.0.0.1:" + address.getPort() + "/").openStream()) {
                answer.readAllBytes();
            }
        }
        try (Socket socket = new Socket(loopback, address.getPort())) {
            socket.setTcpNoDelay(true);
            socket.setKeepAlive(true);
            socket.setSoLinger(true, 5);
            socket.setTrafficClass(0x10);
            socket.setReceiveBufferSize(65536);
            socket.setOption(ExtendedSocketOptions.TCP_KEEPIDLE, 30);
            socket.getSoLinger();
            socket.getSendBufferSize();
        }
        try (SocketChannel channel = SocketChannel.open(address)) {
            channel.setOption(StandardSocketOptions.TCP_NODELAY, true);
            channel.getOption(StandardSocketOptions.SO_LINGER);
        }
        try (DatagramChannel channel = DatagramChannel.open()) {
            channel.setOption(StandardSocketOptions.SO_BROADCAST, true);
            channel.setOption(StandardSocketOptions.SO_SNDBUF, 32768);
        }
        server.stop(0);
    }
}
